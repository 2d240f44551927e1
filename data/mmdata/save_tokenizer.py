"""`save_tokenizer`: a copy of a tokenizer beside what was made with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mmdata.corpus.writer import fsync
from mmdata.tokenizer import FileTokenizer, Tokenizer
from mmdata.tokenizer_identity import BYTES, BYTES_FILE


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a tokenizer into a folder, so that `load_tokenizer(folder)` gives it back; return the file.

    It is `tokenizer.json`, byte for byte the file that was loaded, or for bytes a small `tokenizer_bytes.json`. The
    file is synced and then renamed, so it is whole or not there; the other of the two goes, if it is there.

    Raises:
        OSError: the folder cannot be written.
    """
    if isinstance(tokenizer, FileTokenizer):
        name, content = "tokenizer.json", tokenizer.source
    else:
        name, content = BYTES_FILE, (json.dumps({"kind": BYTES}) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    path, scratch = folder / name, folder / f"{name}.writing"
    scratch.write_bytes(content)
    fsync(scratch)
    os.replace(scratch, path)
    for other in {"tokenizer.json", BYTES_FILE} - {name}:
        (folder / other).unlink(missing_ok=True)
    return path

"""One shard: pieces of files in, tokens and per-document facts out. Worker processes run this file."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Protocol

import numpy as np

from mmdata.corpus.writer import fsync
from mmdata.prepare.encoder import Encoder
from mmdata.prepare.skips import SkipLog
from mmdata.prepare.sources import Piece, read_piece
from mmdata.prepare.text_files import parse_separator
from mmdata.tokenizer import Tokenizer, load_tokenizer


class Task(Protocol):
    """Protocol of the task to make a shard: `NUMBER.bin`, tokens of `dtype`, and `NUMBER.json` in a folder.

    `weight` is the rough size of its work in bytes of text.
    """

    @property
    def number(self) -> int:
        """Number of the shard."""

    @property
    def folder(self) -> str:
        """Folder that it goes to."""

    @property
    def dtype(self) -> str:
        """Dtype of its tokens."""

    @property
    def weight(self) -> int:
        """Rough size of the text in bytes."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to be made: its number, the pieces it reads, the folder it goes to, and how text becomes tokens."""

    number: int
    pieces: tuple[Piece, ...]
    folder: str
    tokenizer: str  # "bytes" or the path of a tokenizer.json
    tokenizer_hash: str  # of its content, so that no worker goes on with an earlier file of the same path
    text_field: str
    dtype: str
    separator: str | None = None  # as `parse_separator` reads it

    @property
    def weight(self) -> int:
        """Rough size of the text in bytes."""
        return sum(piece.weight for piece in self.pieces)


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        tokens: dtype[n], memory-mapped.
        facts: uint64[documents, 3]: tokens with EOD, content hash, UTF-8 bytes of each document.
        skips: documents and files left out.
    """

    tokens: np.ndarray
    facts: np.ndarray
    skips: SkipLog


def start_worker() -> None:
    """Set a worker process up: one thread, no traceback at Ctrl-C, and its end when its parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_shard(task: ShardTask) -> int:
    """Make a shard; return its weight in bytes, for the progress bar.

    The `.json` file is renamed into place last: its presence means that the shard is whole and on disk. While it is
    made, the size of its `.seen` file is the bytes of text that are done (the file is sparse: it takes no room).
    """
    base = Path(task.folder) / f"{task.number:06d}"
    tokenizer, dtype = _cached_tokenizer(task.tokenizer, task.tokenizer_hash), np.dtype(task.dtype)
    separator = None if task.separator is None else parse_separator(task.separator)
    with open(f"{base}.bin.tmp", "w+b") as stream, open(f"{base}.seen", "wb") as seen:
        encoder = Encoder(tokenizer, dtype, stream, lambda size: seen.truncate(min(size, task.weight)))
        for piece in task.pieces:
            for item in read_piece(piece, task.text_field, separator):
                encoder.add(item)
        facts = encoder.finish()
        tokens = stream.tell() // dtype.itemsize
    np.save(f"{base}.tmp.npy", facts)
    meta = {"tokens": tokens, "skips": encoder.skips.dump()}
    Path(f"{base}.json.tmp").write_text(json.dumps(meta), encoding="utf-8")
    for written, name in ((".bin.tmp", ".bin"), (".tmp.npy", ".npy"), (".json.tmp", ".json")):
        fsync(Path(f"{base}{written}"))
        os.replace(f"{base}{written}", f"{base}{name}")
    Path(f"{base}.seen").unlink()
    return task.weight


def bytes_seen(task: Task) -> int:
    """Bytes of text done of a shard that is being made; 0 if it is not."""
    try:
        return Path(task.folder, f"{task.number:06d}.seen").stat().st_size
    except OSError:
        return 0


def is_done(task: Task) -> bool:
    """Whether the shard is whole."""
    base = Path(task.folder) / f"{task.number:06d}"
    try:
        expected = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))["tokens"]
        return Path(f"{base}.bin").stat().st_size == expected * np.dtype(task.dtype).itemsize
    except (OSError, ValueError, KeyError):
        return False


def open_shard(task: ShardTask) -> Shard:
    """Read a finished shard."""
    base = Path(task.folder) / f"{task.number:06d}"
    meta = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))
    dtype = np.dtype(task.dtype)
    tokens = np.asarray(np.memmap(f"{base}.bin", dtype=dtype, mode="r")) if meta["tokens"] else np.empty(0, dtype)
    return Shard(tokens, np.load(f"{base}.npy"), SkipLog.load(meta["skips"]))


@lru_cache(maxsize=1)
def _cached_tokenizer(path: str, content_hash: str) -> Tokenizer:
    """One tokenizer for all shards of a worker."""
    return load_tokenizer(path)

"""`manifest.json`: the facts about a corpus folder. It is written last: where it is, the folder is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdata.errors import DataError

NAME = "manifest.json"
FORMAT = 1
NAMES_KEPT = 1000  # skipped files named in the manifest, for each reason; the counts are always exact


@dataclass
class SplitInfo:
    """Facts about one split, `train` or `valid`.

    Attributes:
        documents: their number.
        bytes: of UTF-8 text, without end-of-document tokens.
        tokens: their number, with an end-of-document token for each document.
        max_token_id: the largest.
        files: `{file name: {"bytes", "sha256"}}`.
    """

    documents: int
    bytes: int
    tokens: int
    max_token_id: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Manifest:
    """Facts about a prepared corpus. There are no times among them, so equal requests give equal bytes."""

    request: str  # sha256 over inputs and options: two requests with one value give the same corpus
    tokenizer: dict[str, Any]  # kind ("bytes", "trained", "file"), sha256, content, and what it was trained on
    vocab_size: int
    eod_id: int
    dtype: str
    splits: dict[str, SplitInfo]
    inputs: dict[str, Any]
    skipped: dict[str, dict[str, Any]]  # reason -> {"count", "names"}
    format: int = FORMAT
    images: dict[str, Any] | None = None  # of a corpus with images: their token, rules of tiles and counts

    def write(self, path: Path) -> None:
        """Write as indented JSON with sorted keys; a corpus of text says nothing of images."""
        facts = {name: value for name, value in asdict(self).items() if name != "images" or value is not None}
        path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        DataError: the file is missing, not JSON, or of another format.
    """
    path = Path(folder) / NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: SplitInfo(**split) for name, split in raw.pop("splits").items()}
        manifest = Manifest(splits=splits, **raw)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: make the corpus with launch/prepare.py --output {folder}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}): prepare the corpus again, --force") from None
    if manifest.format != FORMAT:
        raise DataError(f"{path} has format {manifest.format}, this mmdata reads {FORMAT}: prepare again with --force")
    return manifest


def recorded_max_id(prefix: Path, bin_bytes: int) -> int | None:
    """Largest token id that the manifest beside `prefix` records for it; None if there is none or it is of other data.

    `bin_bytes` is the size of the .bin file at hand, compared with the recorded one.
    """
    try:
        split = read_manifest(prefix.parent).splits[prefix.name]
        recorded = split.files[f"{prefix.name}.bin"]["bytes"]
    except (DataError, KeyError):
        return None
    return split.max_token_id if recorded == bin_bytes else None


def recorded_sha256(prefix: Path, bin_bytes: int) -> dict[str, str]:
    """SHA-256 of the pair at `prefix` by the manifest beside it, ``{"bin", "idx"}``; empty if it records none of it.

    `bin_bytes` is the size of the .bin file at hand, compared with the recorded one.
    """
    try:
        files = read_manifest(prefix.parent).splits[prefix.name].files
        if files[f"{prefix.name}.bin"]["bytes"] != bin_bytes:
            return {}
        return {kind: files[f"{prefix.name}.{kind}"]["sha256"] for kind in ("bin", "idx")}
    except (DataError, KeyError):
        return {}


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

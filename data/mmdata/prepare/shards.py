"""One shard: pieces of files in, tokens and per-document facts out. Worker processes run this file."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from mmdata.corpus.writer import fsync
from mmdata.hashing import content_hash
from mmdata.prepare.sources import Document, Piece, Skip, read_piece
from mmdata.tokenizer import Tokenizer, load_tokenizer

_BATCH_BYTES = 1 << 19  # text encoded at a time: bounds a worker's memory


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
    skips: list[Skip]


def start_worker() -> None:
    """Set a worker process up: one thread, no traceback at Ctrl-C, and its end when its parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_shard(task: ShardTask) -> int:
    """Make a shard; return its weight in bytes, for the progress bar.

    The `.json` file is renamed into place last: its presence means that the shard is whole and on disk.
    """
    weight = sum(piece.weight for piece in task.pieces)
    base = Path(task.folder) / f"{task.number:06d}"
    skips: list[Skip] = []
    facts: list[np.ndarray] = []
    tokenizer, dtype = _cached_tokenizer(task.tokenizer, task.tokenizer_hash), np.dtype(task.dtype)
    with open(f"{base}.bin.tmp", "wb") as stream:
        for batch in _batches(task, skips):
            flat, fact = _encode(tokenizer, batch, dtype)
            flat.tofile(stream)
            facts.append(fact)
    np.save(f"{base}.tmp.npy", np.concatenate(facts) if facts else np.empty((0, 3), dtype=np.uint64))
    tokens = Path(f"{base}.bin.tmp").stat().st_size // dtype.itemsize
    Path(f"{base}.json.tmp").write_text(json.dumps({"tokens": tokens, "skips": skips}), encoding="utf-8")
    for written, name in ((".bin.tmp", ".bin"), (".tmp.npy", ".npy"), (".json.tmp", ".json")):
        fsync(Path(f"{base}{written}"))
        os.replace(f"{base}{written}", f"{base}{name}")
    return weight


def is_done(task: ShardTask) -> bool:
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
    return Shard(tokens, np.load(f"{base}.npy"), [Skip(*skip) for skip in meta["skips"]])


@lru_cache(maxsize=1)
def _cached_tokenizer(path: str, content_hash: str) -> Tokenizer:
    """One tokenizer for all shards of a worker."""
    return load_tokenizer(path)


def _batches(task: ShardTask, skips: list[Skip]) -> Iterator[Sequence[Document]]:
    batch: list[Document] = []
    size = 0
    for piece in task.pieces:
        for item in read_piece(piece, task.text_field):
            if isinstance(item, Skip):
                skips.append(item)
                continue
            batch.append(item)
            size += len(item.data)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: Sequence[Document], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    flat, lengths = tokenizer.encode_documents([document.text for document in batch], dtype)
    facts = np.empty((len(batch), 3), dtype=np.uint64)
    facts[:, 0] = lengths
    facts[:, 1] = [content_hash(document.data) for document in batch]
    facts[:, 2] = [len(document.data) for document in batch]
    return flat, facts

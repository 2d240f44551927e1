"""`ArrayCache`: arrays about a corpus that are worked out once, kept on disk, and memory-mapped by every process.

An entry is a folder `NAME-DIGEST` with one `.npy` file an array and `entry.json`, which holds the key that the digest
is of. The key names the corpus by its fingerprint and every option that the arrays depend on, so an entry of a corpus
that has changed is never found again. Entries are written beside their final name, synced and renamed: one that is
there is whole. The cache folder may be deleted at any time when no run reads from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.corpus.build_lock import BuildLock, take_lock, wait_for_lock
from mmdata.corpus.writer import fsync

FOLDER = ".mmdata-index"  # of a cache beside its corpus
_FORMAT = 1
_RECORD = "entry.json"

Tick = Callable[[float], None]
"""Function that a builder tells the share of its work done, 0 to 1."""


@dataclass(frozen=True)
class Entry:
    """Arrays of one kind about one corpus.

    Attributes:
        arrays: by name; memory-mapped and read-only where they come from disk.
        facts: small JSON values.
        folder: where they lie; None if they are in memory alone.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


class ArrayCache:
    """Cache of one corpus, in the first of some folders that can be written; read from all of them.

    Args:
        folders: candidates. Where none can be written, entries are worked out in memory, by each process for itself.
        log: gets a line when an entry is built, or waited for.
    """

    def __init__(self, folders: Sequence[Path], log: Callable[[str], None] | None = None) -> None:
        self.folders, self.log = tuple(folders), log or _silent

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the log: worker processes say nothing."""
        return {"folders": self.folders, "log": _silent}

    def get(self, name: str, key: Mapping[str, Any], make: Callable[[Tick], Entry], what: str) -> Entry:
        """Entry of a key; made, if it is nowhere yet, by one process while all others wait.

        Args:
            name: kind of the entry, a plain file name.
            key: everything that the arrays depend on, as JSON.
            make: works the arrays out.
            what: names the entry in messages.
        """
        label = _label(name, key)
        while True:
            if (found := self.find(name, key)) is not None:
                return found
            try:
                folder = self._writable()
                lock = take_lock(folder / f"{label}.lock")
            except OSError as error:
                self.log(f"{what}: kept in memory by each process, as no cache folder can be written ({error})")
                return make(_ignore)
            if lock is None:
                wait_for_lock(folder / f"{label}.lock", lambda: self.find(name, key) is not None, what, self.log)
                continue
            with lock:
                if (found := self.find(name, key)) is not None:  # built while this process came to the lock
                    return found
                return self._build(folder, label, key, make, what, lock)

    def find(self, name: str, key: Mapping[str, Any]) -> Entry | None:
        """Entry of a key if it is on disk, else None."""
        label = _label(name, key)
        found = (read_entry(folder / label, _plain(key)) for folder in self.folders)
        return next((entry for entry in found if entry is not None), None)

    def put(self, name: str, key: Mapping[str, Any], entry: Entry) -> None:
        """Keep an entry, without a lock; nothing happens where that cannot be done."""
        with contextlib.suppress(OSError):
            _publish(self._writable(), _label(name, key), _plain(key), entry)

    def _build(
        self,
        folder: Path,
        label: str,
        key: Mapping[str, Any],
        make: Callable[[Tick], Entry],
        what: str,
        lock: BuildLock,
    ) -> Entry:
        self.log(f"building {what}")
        began = time.monotonic()

        def tick(done: float) -> None:
            lock.done = done

        made = make(tick)
        try:
            _publish(folder, label, _plain(key), made)
        except OSError as error:  # a full disk, or another builder, which took this process for dead
            if (found := read_entry(folder / label, _plain(key))) is not None:
                return found
            self.log(f"{what}: kept in memory by each process, as it cannot be written to {folder} ({error})")
            return made
        self.log(f"built {what} in {time.monotonic() - began:.1f} s, kept in {folder}")
        return read_entry(folder / label, _plain(key)) or made

    def _writable(self) -> Path:
        """First folder that can be made and written.

        Raises:
            OSError: there is none.
        """
        problem: OSError = FileNotFoundError("no folder given")
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{uuid.uuid4().hex}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                problem = error
            else:
                return folder
        raise problem


def cache_beside(source: str | Path, cache_dir: str | None, log: Callable[[str], None] | None = None) -> ArrayCache:
    """Cache for the corpus at `source`.

    It lies in `cache_dir` if that is given; else in the corpus's folder or, where that cannot be written, in
    `$XDG_CACHE_HOME/mmdata` (`~/.cache/mmdata`).
    """
    if cache_dir is not None:
        return ArrayCache([Path(cache_dir)], log)
    path = Path(source).resolve()
    own = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return ArrayCache([(path if path.is_dir() else path.parent) / FOLDER, Path(own, "mmdata")], log)


def read_entry(folder: Path, key: Any) -> Entry | None:
    """Read an entry, memory-mapped; None where it is missing, damaged, or of another key (None takes any)."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT or (key is not None and record["key"] != key):
            return None
        arrays = {name: _map(folder / f"{name}.npy", shape) for name, shape in record["shapes"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Entry(arrays, record["facts"], folder)


def _map(path: Path, shape: list[int]) -> np.ndarray:
    # A plain ndarray over the map: slicing np.memmap itself costs microseconds. An empty file cannot be mapped.
    array = np.asarray(np.load(path, mmap_mode="r" if all(shape) else None, allow_pickle=False))
    if list(array.shape) != shape:
        raise ValueError(f"{path} has shape {array.shape}")
    return array


def _publish(folder: Path, label: str, key: Any, entry: Entry) -> None:
    """Write an entry beside its final name, sync it, and rename it; one that got there first stays."""
    scratch = folder / f"{label}.writing-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        for name, array in entry.arrays.items():
            np.save(scratch / f"{name}.npy", array, allow_pickle=False)
            fsync(scratch / f"{name}.npy")
        shapes = {name: list(array.shape) for name, array in entry.arrays.items()}
        record = {"format": _FORMAT, "key": key, "facts": dict(entry.facts), "shapes": shapes}
        (scratch / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        fsync(scratch / _RECORD)
        fsync(scratch)
        _rename(scratch, folder / label, key)
        fsync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for left in folder.glob(f"{label}.writing-*"):  # by builders that were killed
        shutil.rmtree(left, ignore_errors=True)


def _rename(scratch: Path, final: Path, key: Any) -> None:
    if final.exists() and read_entry(final, key) is None:  # damaged: a whole one takes its place
        aside = final.with_name(f"{final.name}.writing-{uuid.uuid4().hex}")
        os.replace(final, aside)
    try:
        os.rename(scratch, final)
    except OSError:
        if read_entry(final, key) is None:
            raise


def _label(name: str, key: Mapping[str, Any]) -> str:
    return f"{name}-{hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:20]}"


def _plain(key: Mapping[str, Any]) -> Any:
    """A key as it reads back from JSON."""
    return json.loads(json.dumps(key))


def _silent(line: str) -> None:
    pass


def _ignore(done: float) -> None:
    pass

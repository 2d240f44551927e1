"""`metrics.jsonl`: one JSON object a line, the record of a run that plots and summaries are made from."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends records; each is on disk (in the kernel's hands) when :meth:`write` returns.

    Where it cannot be written, for want of room, say, records wait in memory and are tried again with every later one:
    a full disk costs a run no step and no record.

    Args:
        path: the file; its folder is made.
        keep_through_step: on resume, the step of the checkpoint: later entries are dropped, since those steps run
            again. None keeps all. A last line that a crash cut short is dropped in either case.
        warn: is told, once, that records wait.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self, path: Path, keep_through_step: int | None = None, warn: Callable[[str], None] = lambda line: None
    ) -> None:
        self.path, self._warn, self._waiting, self._warned = Path(path), warn, b"", False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep(self.path, keep_through_step)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record with the time of writing (`time`, UTC).

        Numbers that JSON lacks (NaN, infinity) become null; 0-d tensors become numbers.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._waiting += json.dumps({**_plain(record), "time": time}, allow_nan=False).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                self._warn(f"{self.path} cannot be written ({error.strerror}): records wait in memory for room")
            self._warned = True

    def close(self) -> None:
        """Close the file; nothing is lost without it, but for records that still wait."""
        with contextlib.suppress(OSError):
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        while self._waiting:  # a write may take a part only
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run, oldest first, without lines that a crash cut short.

    Args:
        path: the file, or the run folder that holds it.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    return [record for _, record in _entries(file) if record is not None]


def read_counted(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the records of a file, oldest first, and count the lines that are none.

    Raises:
        OSError: it cannot be read.
    """
    entries = [record for _, record in _entries(file)]
    records = [record for record in entries if record is not None]
    return records, len(entries) - len(records)


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield every line and its record, None for a line that is not one."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield line, record if isinstance(record, dict) and line.endswith(b"\n") else None


def _keep(path: Path, through_step: int | None) -> None:
    """Drop broken lines and those past `through_step`, in one atomic replacement, if there are any."""
    dropped, scratch = False, path.with_name(path.name + ".tmp")
    with scratch.open("wb") as kept:
        for line, record in _entries(path):
            if record is None or (through_step is not None and record.get("step", 0) > through_step):
                dropped = True
            else:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    if dropped:
        os.replace(scratch, path)
    else:
        scratch.unlink()


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and arrays, without importing their packages
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

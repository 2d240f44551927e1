"""`ledger.jsonl`: the steps that a run left out, with their rows, and where it went back; one JSON object a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtrain.log.metrics import MetricsWriter, read_metrics

FILE_NAME = "ledger.jsonl"


class Ledger:
    """Writer of a run's ledger; a run that leaves nothing out has none.

    Args:
        folder: of the run.
        keep_through_step: the step that the run goes on from: later entries are dropped, since those steps run again.
        warn: is told, once, that records wait for room on the disk.
    """

    def __init__(self, folder: Path, keep_through_step: int, warn: Callable[[str], None]) -> None:
        self._path, self._warn = folder / FILE_NAME, warn
        self._writer: MetricsWriter | None = None
        if self._path.exists():
            self._writer = MetricsWriter(self._path, keep_through_step, warn)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record with the time of writing."""
        if self._writer is None:
            self._writer = MetricsWriter(self._path, warn=self._warn)
        self._writer.write(record)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's ledger, oldest first; none where it has no ledger."""
    path = folder / FILE_NAME
    return read_metrics(path) if path.is_file() else []

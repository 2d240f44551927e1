"""Rows that a run leaves out since it went back to an earlier checkpoint, and on record where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtrain.log.ledger import read_ledger

ENTRY = "left_out"
"""Entry of a checkpoint's record, and of a ledger's record of a rollback."""


@dataclass(frozen=True)
class LeftOut:
    """Rows of a phase's stream that are passed over.

    Attributes:
        to_step: the step that the run went back to.
        phase: index of the phase.
        first: the first row.
        end: the row after the last.
    """

    to_step: int
    phase: int
    first: int
    end: int


def first_kept(row: int, phase: int, left_out: Iterable[LeftOut]) -> int:
    """Return the first row of a phase from `row` on that is not left out."""
    mine = sorted((one.first, one.end) for one in left_out if one.phase == phase)
    for first, end in mine:
        if first <= row < end:
            row = end
    return row


def recorded_left_out(meta: Mapping[str, Any], run: Path | None) -> tuple[LeftOut, ...]:
    """Return the rows that a run leaves out which goes on from a checkpoint.

    Args:
        meta: the checkpoint's record.
        run: the run's folder, if the checkpoint is its own: a run that went back to it and was killed before it saved
            again has that in its ledger alone.
    """
    found = [LeftOut(**one) for one in meta.get(ENTRY, [])]
    for record in read_ledger(run) if run is not None else []:
        if ENTRY in record and record["step"] == meta["step"]:
            found += (LeftOut(**one) for one in record[ENTRY])
    return tuple(dict.fromkeys(found))


def as_records(left_out: Iterable[LeftOut]) -> list[dict[str, int]]:
    """Return rows that are left out as a checkpoint's record has them."""
    return [asdict(one) for one in left_out]

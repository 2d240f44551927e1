"""Rows that a rank reads: its share of each step, on from where the run stands, of the phase at work."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from mmdata.rows.assemble import Row
from mmdata.rows.loader import PackedBatch
from mmtrain.checkpoint.progress import Progress
from mmtrain.train.batches import BatchReader
from mmtrain.train.curriculum import RunStep


@dataclass
class Stream:
    """Rows whose two tokens are the phase and the number of the row."""

    phase: int

    def __getitem__(self, i: int) -> Row:
        tokens = np.array([self.phase, i], dtype=np.int32)
        return Row(tokens, tokens, np.ones(2, dtype=np.bool_), np.arange(2), np.array([0, 2], dtype=np.int32))


@dataclass
class Inputs:
    """Streams by phase, and which were opened."""

    opened: list[int] = field(default_factory=list)

    def train_stream(self, phase_index: int) -> Stream:
        self.opened.append(phase_index)
        return Stream(phase_index)


def step(phase: int, first_row: int, num_rows: int) -> RunStep:
    return RunStep(Progress(), phase, first_row, num_rows, 0.0)


def rows(batches: list[PackedBatch]) -> list[tuple[int, int]]:
    return [tuple(row) for batch in batches for row in batch.tokens_BS.tolist()]


@pytest.mark.parametrize(("ranks", "rows_each"), [(1, 1), (2, 1), (2, 2)])
def test_ranks_share_the_rows_of_each_step_and_of_its_phase(ranks: int, rows_each: int) -> None:
    """From row 40, as after a resume; the batch halves, a phase begins, and rows are passed over."""
    steps = [step(0, 40, 8), step(0, 48, 4), step(1, 0, 4), step(1, 4, 4), step(1, 12, 8)]
    inputs = [Inputs() for _ in range(ranks)]
    readers = [BatchReader(inputs[rank], rank, ranks, rows_each, num_workers=0) for rank in range(ranks)]
    for one in steps:
        shares = [rows(reader.read(one)) for reader in readers]
        expected = [(one.phase_index, one.first_row + i) for i in range(one.num_rows)]
        assert sorted(row for share in shares for row in share) == expected
        assert all(len(share) == one.num_rows // ranks for share in shares)
    assert all(found.opened == [0, 1, 1] for found in inputs)  # one that goes on is not opened anew

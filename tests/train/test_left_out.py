"""Rows that a run leaves out: where the next step reads, and what is on record of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.checkpoint.progress import Progress
from mmtrain.log.ledger import Ledger
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.left_out import LeftOut, as_records, first_kept, recorded_left_out
from tests.checkpoint.fake import config
from tests.train.test_trainer import PHASES

ONE, TWO, FAR = LeftOut(4, 0, 8, 16), LeftOut(4, 0, 8, 24), LeftOut(9, 0, 24, 32)


@pytest.mark.parametrize(
    ("row", "left_out", "expected"),
    [(7, [ONE], 7), (8, [ONE], 16), (15, [ONE], 16), (16, [ONE], 16), (8, [ONE, TWO], 24), (8, [FAR, TWO], 32),
     (8, [LeftOut(4, 1, 8, 16)], 8), (8, [], 8)],
)  # fmt: skip
def test_the_next_row_is_the_first_that_is_kept(row: int, left_out: list[LeftOut], expected: int) -> None:
    assert first_kept(row, 0, left_out) == expected


def test_a_step_reads_on_behind_them_and_counts_as_if_they_were_not_there(tmp_path: Path) -> None:
    plan = RunPlan(scaled_phases(config(tmp_path, PHASES).stage), 1, 1)
    plain = [plan.next(Progress(1, 32, 0, 2, 32)), plan.next(Progress(4, 128, 0, 8, 128))]
    plan.left_out = (LeftOut(1, 0, 2, 6), LeftOut(1, 1, 0, 5))
    step, other = plan.next(Progress(1, 32, 0, 2, 32)), plan.next(Progress(4, 128, 0, 8, 128))
    assert (step.first_row, step.num_rows, step.lr, step.before) == (6, 2, plain[0].lr, plain[0].before)
    assert step.after(32) == Progress(2, 64, 0, 8, 64)
    assert (other.phase_index, other.first_row) == (1, 5) and plain[1].first_row == 0


def test_a_checkpoint_and_a_ledger_have_them_on_record(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0, print)
    assert not list(tmp_path.iterdir())  # a run that leaves nothing out has none
    ledger.write({"step": 3, "loss": float("nan")})
    ledger.write({"step": 9, "left_out": as_records([ONE, FAR])})
    ledger.close()
    meta = {"step": 9, "left_out": as_records([ONE])}
    assert recorded_left_out(meta, None) == (ONE,)
    assert recorded_left_out(meta, tmp_path) == (ONE, FAR)
    assert recorded_left_out({"step": 8}, tmp_path) == () == recorded_left_out({"step": 9}, None)
    Ledger(tmp_path, 8, print).close()  # going on from step 8 runs what came after it again
    assert recorded_left_out(meta, tmp_path) == (ONE,)

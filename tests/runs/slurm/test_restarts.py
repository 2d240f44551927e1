"""What follows a job's end: pure decisions, from exit codes and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.runs.slurm.restarts import (
    FINISHED,
    HAND_OVER,
    REQUEUE,
    STOP,
    JobStart,
    begin,
    fruitless,
    judge,
    newest_step,
    read_starts,
    write_starts,
)


def starts(*steps: int) -> list[JobStart]:
    """A chain's starts, each with the step of the newest checkpoint then."""
    return [JobStart(str(i), i == 0, step) for i, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "now", "count"),
    [((), 0, 0), ((0,), 0, 0), ((0, 0), 0, 1), ((0, 0, 0), 0, 2), ((0, 10, 10), 10, 2), ((0, 10, 10), 20, 0),
     ((0, 10, 20), 20, 1), ((0, 10, 10, 20), 20, 1), ((5, 5), 5, 1)],
)  # fmt: skip
def test_restarts_without_a_new_checkpoint_are_counted(steps: tuple[int, ...], now: int, count: int) -> None:
    assert fruitless(starts(*steps), now) == count


def test_a_new_submission_counts_from_the_start() -> None:
    again = [*starts(0, 0, 0), JobStart("9", True, 0), JobStart("9", False, 0)]
    assert fruitless(again, 0) == 1


@pytest.mark.parametrize(
    ("codes", "code", "last", "action", "exit_code"),
    [
        ([0, 0], 0, True, FINISHED, 0),
        ([143, 143], 1, True, REQUEUE, 1),
        ([143, 143], 1, False, HAND_OVER, 0),
        ([138, 138], 138, False, HAND_OVER, 0),  # srun python, by SIGUSR1
        ([], 143, True, REQUEUE, 143),
        ([3, 137], 1, False, REQUEUE, 1),
        ([6], 1, True, REQUEUE, 1),
        ([1, 143], 1, True, REQUEUE, 1),
        ([], 137, True, REQUEUE, 137),
        ([2, 2], 1, False, STOP, 2),
        ([4, 143], 1, True, STOP, 4),
        ([5], 1, True, STOP, 5),
        ([], 2, True, STOP, 2),
        ([], 7, True, REQUEUE, 7),
    ],
)
def test_the_end_of_a_job_decides(codes: list[int], code: int, last: bool, action: str, exit_code: int) -> None:
    verdict = judge(starts(0, 10), codes, code, 20, last)
    assert (verdict.action, verdict.exit_code) == (action, exit_code) and verdict.reason


@pytest.mark.parametrize("codes", [[3], [143]])
def test_two_fruitless_restarts_stop_a_chain(codes: list[int]) -> None:
    assert judge(starts(10, 10), codes, 1, 10, True).action == REQUEUE
    verdict = judge(starts(10, 10, 10), codes, 1, 10, True)
    assert verdict.action == STOP and verdict.exit_code != 0 and "2 restarts in a row" in verdict.reason
    recorded, verdict = begin(starts(10, 10, 10), "7", False, 10)  # the node died, so that nobody judged its end
    assert verdict is not None and verdict.action == STOP and len(recorded) == 3
    assert begin(recorded, "8", False, 10)[1].action == STOP
    assert begin(recorded, "8", True, 10)[1] is None  # submitted anew


def test_links_behind_a_finished_run_have_nothing_to_do() -> None:
    done = [JobStart("1", True, 0, 10, FINISHED)]
    assert begin(done, "2", False, 10)[1].action == FINISHED
    recorded, verdict = begin(done, "2", True, 10)  # a longer run under the same name
    assert verdict is None and len(recorded) == 2


def test_the_record_is_kept_beside_the_run(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == [] and newest_step(tmp_path) == 0
    write_starts(tmp_path / "slurm", starts(0, 3))
    assert read_starts(tmp_path / "slurm") == starts(0, 3)
    (tmp_path / "slurm/restarts.json").write_text("{")
    assert read_starts(tmp_path / "slurm") == []
    for name in ("step-00000010", "step-00000020", "step-00000030.writing"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 20

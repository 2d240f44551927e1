"""Runs that meet poisoned rows: which steps they skip, what is on record, and that going back leaves no trace."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.checkpoint.progress import read_meta
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.log.ledger import read_ledger
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.spike_guard import NO_LIMITS, Limits
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, packed_row, whole
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, environment, steps
from tests.dist.spike_launcher import ROLLBACKS
from tests.dist.test_runs import exact
from tests.dist.warm import run_script

PHASE = ["stage.phases.0.tokens=12288", "stage.phases.0.lr=[{kind: constant, tokens: 12288, end: 0.01}]"]
GUARD = ["guard.spike_deviations=6", "guard.spike_window=8", "guard.max_in_row=3", "guard.rollback_steps=2"]
OPTIONS = [*SMALL, *PHASE, *GUARD, "run.name=r", "checkpoint.interval=4", "checkpoint.keep=0"]
FIRST, LAST, ROWS, STEPS = 15, 17, 8, 24  # the poisoned steps; rows a step; steps of the run
POISON = f"{(FIRST - 1) * ROWS}:{LAST * ROWS}"
BACK_TO = 12  # the newest checkpoint that is two steps before the first
LEFT_OUT = {"to_step": BACK_TO, "phase": 0, "first": BACK_TO * ROWS, "end": LAST * ROWS}


def limited_steps(parallel: ParallelConfig) -> list[tuple[bool, bool, bool]]:
    """First steps of one model, whose limits lie just above and just below what it gives: skipped, spike, moved."""
    layout = plan_layout(mesh.world_size(), parallel, MODEL, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    found, given = [], NO_LIMITS
    for signs in ((1, 1), (1, 1), (-1, 1), (1, -1)):
        model = apply_parallel(meta_model(MODEL), context, parallel, torch.float32)
        model.initialise(7)
        before, optimizer = whole(model.module), build_optimizer(model.module, OptimConfig())
        limits = Limits(*(x * (1 + 1e-6 * sign) for x, sign in zip(given, signs, strict=True)))  # at first still none
        batches = [packed_row(2 * context.dp_rank), packed_row(2 * context.dp_rank + 1)]
        result = train_step(model, optimizer, batches, 1e-2, 1e4, clip_grad=1.0, limits=limits)
        given = Limits(result.loss, result.grad_norm)
        after = whole(model.module)
        found.append((result.skipped, result.spike, any(not torch.equal(before[name], after[name]) for name in after)))
    mesh.stop()
    return found


@pytest.mark.parametrize("axis", ["dp", "tp", "cp", "pp"])
def test_a_limit_is_of_the_whole_batch_s_loss_and_norm(pool: Pool, axis: str) -> None:
    parallel = ParallelConfig(cp=1) if axis == "dp" else replace(ParallelConfig(cp=1), **{axis: 2})
    taken, skipped = (False, False, True), (True, True, False)
    for found in pool.run(limited_steps, parallel, world=2):
        assert found == [taken, taken, skipped, skipped]


def launch(
    corpus: Path, folder: Path, *more: str, processes: int | None = 2, code: int = 0, **told: str
) -> subprocess.CompletedProcess:
    given = [*OPTIONS, f"data.path={corpus}", f"run.dir={folder}", *more]
    done = run_script("tests/dist/spike_launcher.py", given, {**environment(), **told}, processes, timeout=300)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def went_back(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("back")
    launch(corpus, folder, POISON=POISON)
    return folder / "r"


@pytest.mark.parametrize("parallel", [[], pytest.param(["parallel.tp=2"], marks=pytest.mark.slow),
                                      pytest.param(["parallel.cp=2"], marks=pytest.mark.slow),
                                      pytest.param(["parallel.pp=2"], marks=pytest.mark.slow)])  # fmt: skip
def test_poisoned_steps_are_skipped_and_on_record(corpus: Path, tmp_path: Path, parallel: list[str]) -> None:
    launch(corpus, tmp_path, "guard.max_in_row=9", *parallel, processes=2 if parallel else 1, POISON=POISON)
    run = tmp_path / "r"
    records, ledger = steps(run), read_ledger(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    skipped = [record["step"] for record in records if record.get("skipped")]
    assert skipped == [record["step"] for record in ledger] == list(range(FIRST, LAST + 1))
    for record in ledger:
        assert record["first_row"] == (record["step"] - 1) * ROWS and record["rows"] == ROWS and record["finite"]
        assert record["loss"] > record["loss_limit"] or record["grad_norm"] > record["grad_norm_limit"]
    assert records[-1]["loss"] < records[FIRST - 2]["loss"] + 0.2  # the weights learned none of it
    assert f"step {FIRST} skipped: its loss" in (run / "log.txt").read_text()


def test_a_run_that_goes_back_is_the_run_without_the_data_since_then(
    corpus: Path, tmp_path: Path, went_back: Path
) -> None:
    launch(corpus, tmp_path, "guard.spike_deviations=null", LEAVE_OUT=f"{LEFT_OUT['first']}:{LEFT_OUT['end']}")
    assert exact(went_back) == exact(tmp_path / "r")
    assert [record["first_row"] for record in steps(went_back)][BACK_TO - 1 :: STEPS - BACK_TO] == [
        (BACK_TO - 1) * ROWS, LEFT_OUT["end"] + (STEPS - BACK_TO - 1) * ROWS
    ]  # fmt: skip
    (rollback,) = [record for record in read_ledger(went_back) if "left_out" in record]
    assert rollback["left_out"] == [LEFT_OUT] and rollback["after_step"] == LAST
    assert [record["step"] for record in rollback["skipped"]] == list(range(FIRST, LAST + 1))
    newest = read_meta(all_checkpoints(went_back / "checkpoints")[-1])
    assert newest["left_out"] == [LEFT_OUT] and newest["guard"]["in_row"] == 0
    (aside,) = (went_back / "abandoned").iterdir()
    assert [record["step"] for record in steps(aside)] == list(range(BACK_TO + 1, LAST + 1))


@pytest.mark.parametrize(
    "moment", [one if one == "a rollback has set aside" else pytest.param(one, marks=pytest.mark.slow)
               for one in ROLLBACKS]
)  # fmt: skip
def test_a_kill_around_a_rollback_changes_nothing(corpus: Path, tmp_path: Path, went_back: Path, moment: str) -> None:
    count = LAST + 2 if moment.startswith("a step") else 1
    launch(corpus, tmp_path, code=-9, POISON=POISON, KILL=f"{moment}:{count}:0")
    launch(corpus, tmp_path, "run.resume=auto", POISON=POISON)
    assert exact(tmp_path / "r") == exact(went_back)
    if moment not in ("a rollback begins", "a rollback is on record"):  # what is done is not done again
        assert sum("left_out" in record for record in read_ledger(tmp_path / "r")) == 1
        assert len(list((tmp_path / "r/abandoned").iterdir())) == 1


@pytest.mark.slow
def test_a_run_on_bad_data_goes_back_so_often_and_then_ends(corpus: Path, tmp_path: Path) -> None:
    """Nothing is good from a step on."""
    poison = f"{(FIRST - 1) * ROWS}:100000"
    done = launch(corpus, tmp_path, "guard.max_rollbacks=1", processes=None, code=4, POISON=poison)
    last = done.stderr.strip().splitlines()[-1]
    assert "this phase has used up guard.max_rollbacks=1; lower the learning rate" in last
    assert "Traceback" not in done.stderr
    assert [record["left_out"] for record in read_ledger(tmp_path / "r") if "left_out" in record] == [[LEFT_OUT]]


@pytest.mark.slow
def test_without_a_checkpoint_to_go_back_to_a_run_ends(corpus: Path, tmp_path: Path) -> None:
    done = launch(corpus, tmp_path, "guard.rollback_steps=20", processes=None, code=4, POISON=POISON)
    assert "no checkpoint lies 20 steps before them (guard.rollback_steps)" in done.stderr.strip().splitlines()[-1]

"""Jobs of a sweep through submitit, on its local cluster: one a run, none twice, ends on record, saved at a limit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.runs.sweep.command import read_request
from mmtrain.runs.sweep.grid import SweepRun, grid_runs
from mmtrain.runs.sweep.job import RunJob
from mmtrain.runs.sweep.process import place_of
from mmtrain.runs.sweep.slurm import check_jobs, read_jobs, submit_runs
from mmtrain.runs.sweep.state import Kind, SweepFolder, read_states
from tests.runs.sweep.stand_in import CONFIGS, ROOT, StandIn

submitit = pytest.importorskip("submitit")


@pytest.fixture
def prepared(stand_in: StandIn) -> tuple[Callable[[list[SweepRun]], dict[str, str]], SweepFolder, list[SweepRun]]:
    """A function that submits runs of the stand-in's sweep to processes here, its folder, and its runs."""
    request = read_request(stand_in.arguments("data.path=corpus", "sweep.slurm.gpus=0"), True, CONFIGS)
    folder, runs = SweepFolder(request.sweep), grid_runs(request, CONFIGS)
    folder.path.mkdir(parents=True)
    return lambda some: submit_runs(stand_in.launcher, request.sweep, folder, some, "local"), folder, runs


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_end_and_are_not_submitted_twice(stand_in: StandIn, prepared: tuple) -> None:
    submit, folder, runs = prepared
    stand_in.order("wait", runs[0].name)
    stand_in.order("fail", runs[1].name)
    submitted = submit(runs[:2])
    try:
        assert set(submitted) == {runs[0].name, runs[1].name}
        wait_for(lambda: (folder.runs / runs[0].name / "metrics.jsonl").exists())
        assert submit(runs[:1]) == {}
        wait_for(lambda: folder.outcome(runs[1].name))
        state = read_states(folder, runs)[runs[1].name]
        assert (state.kind, state.reason) == (Kind.FAILED, "error: model.x=1: planned")
    finally:
        stand_in.order("end", runs[0].name)
        wait_for(lambda: folder.outcome(runs[0].name))


def test_a_job_lets_its_run_save_itself_before_the_time_limit(stand_in: StandIn, prepared: tuple) -> None:
    _, folder, (run, *_) = prepared
    order = stand_in.order("wait", run.name)
    folder.logs.mkdir()
    overrides = [*run.overrides, *place_of(folder, run)]
    job = RunJob([sys.executable, str(stand_in.launcher), *overrides], folder, run.name)
    with ThreadPoolExecutor() as threads:
        code = threads.submit(job)
        wait_for(lambda: (folder.runs / run.name / "metrics.jsonl").exists())
        order.unlink()
        again = job.checkpoint()  # submitit calls it on the signal before a limit, and queues what it returns
        assert code.result() == 143
    assert again.function() == 0 and stand_in.started == [run.name] * 2
    assert read_states(folder, [run])[run.name].kind is Kind.DONE


def test_the_job_is_not_taken_for_a_step_of_slurm(
    stand_in: StandIn, prepared: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, folder, (run, *_) = prepared
    monkeypatch.setenv("SLURM_PROCID", "3")
    submit([run])
    wait_for(lambda: read_states(folder, [run])[run.name].kind is Kind.DONE)
    assert "SLURM_PROCID" not in json.loads((stand_in.place / f"environment-{run.name}").read_text())


def test_without_slurm_it_says_so(stand_in: StandIn, prepared: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    request = read_request(stand_in.arguments("data.path=corpus", "sweep.runner=slurm"), True, CONFIGS)
    with pytest.raises(ConfigError, match=r"sweep.runner=slurm: no Slurm here"):
        check_jobs(stand_in.launcher, request.sweep, SweepFolder(request.sweep), [])
    with pytest.raises(ConfigError, match=r"sweep.runner=slurm: no Slurm here"):
        submit_runs(stand_in.launcher, request.sweep, SweepFolder(request.sweep), [])


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["sweep.slurm.partition=h801"], r"sweep\.slurm\.partition=h801: .*did you mean 'h800'\?"),
        (["sweep.slurm.minutes=90"], r"sweep\.slurm\.minutes=90: jobs in partition h800 end"),
        (["data.path=/", "cluster.shared_roots=[/shared]"], r"sweep\.dir=.*: lies below none of cluster\.shared_roots"),
        ([], r"data\.path=corpus: is not there"),
        (["sweep.processes=4"], r"sweep\.slurm\.gpus=1: a run has sweep\.processes=4"),
    ],
)
def test_wrong_jobs_are_refused_before_any_is_submitted(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], line: str
) -> None:
    for name, text in (("sinfo", "echo 'h800*|1:00:00|n/a|4'"), ("sbatch", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    given = ["data.path=corpus", "sweep.runner=slurm", "sweep.slurm.minutes=60",
             f"cluster.shared_roots=[{stand_in.place},{ROOT}]", *more]  # fmt: skip
    request = read_request(stand_in.arguments(*given), True, CONFIGS)
    run = grid_runs(request, CONFIGS)[0]
    config = compose([*run.overrides, "run.name=r"], CONFIGS)
    with pytest.raises(ConfigError, match=line):
        check_jobs(stand_in.launcher, request.sweep, SweepFolder(request.sweep), [config])


def test_what_sbatch_refuses_is_told_in_its_words(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", "exit 0"), ("sbatch", "echo 'sbatch: error: invalid partition: h801' >&2; exit 1")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    request = read_request(stand_in.arguments("data.path=corpus", "sweep.runner=slurm"), True, CONFIGS)
    folder = SweepFolder(request.sweep)
    folder.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"sweep.slurm=.*: sbatch refuses the job: sbatch: error: invalid partition"):
        submit_runs(stand_in.launcher, request.sweep, folder, grid_runs(request, CONFIGS))
    assert read_jobs(folder) == {}

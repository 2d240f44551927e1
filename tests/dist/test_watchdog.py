"""Ranks that die or hang in the middle of a run: the others name them and stop."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig
from mmtrain.errors import RankLost, RunStopped
from mmtrain.health import heartbeat, watchdog
from mmtrain.parallel import mesh
from tests.dist.pool import Pool
from tests.dist.runs import ROOT, SMALL, environment
from tests.dist.stand_in import MINUTES, WARM, StandIn, serve, train
from tests.dist.warm import ENVIRONMENT

START_SECONDS, STOP_SECONDS = 200, 60  # to the first steps; from the signal to the end of the others


class Run:
    """Ranks started by hand: torchrun would end the others when one dies."""

    def __init__(self, world: int, folder: Path, start: Callable[[dict[str, str], Path], Popen | StandIn]) -> None:
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        self.folder = folder
        self.ranks = [start({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder / str(rank))
                      for rank in range(world)]  # fmt: skip

    def wait_for(self, file: str) -> None:
        """Return when a rank has written to the file."""
        end = time.monotonic() + START_SECONDS
        path = self.folder / file
        while not path.exists() or not path.read_text():
            ended = [rank for rank, process in enumerate(self.ranks) if process.poll() is not None]
            assert not ended and time.monotonic() < end, [self.said(rank) for rank in ended]
            time.sleep(0.05)

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def check_all_say(self, expected: str, except_for: list[int]) -> None:
        """The ranks end, with an error that matches."""
        for rank in set(range(len(self.ranks))).difference(except_for):
            code = self.ranks[rank].wait(STOP_SECONDS)
            said = self.said(rank)
            assert code == RankLost.EXIT_CODE, said
            pattern = rf"^error on rank \d: {expected}; see that rank's log .* run\.resume=auto$"
            assert re.search(pattern, said, re.M), said
            assert "Traceback" not in said


def missing(run: Run, rank: int) -> str:
    who = rf"rank {rank} of {len(run.ranks)} \(pid {run.ranks[rank].pid} on \S+\)"
    return rf"{who} is missing: (no sign of life for \d+ s|the store it keeps does not answer), last seen in step \d+"


@contextmanager
def started(world: int, folder: Path, start: Callable[[dict[str, str], Path], Popen | StandIn]) -> Iterator[Run]:
    run = Run(world, folder, start)
    try:
        yield run
    finally:
        for process in run.ranks:
            process.kill()  # a stopped one too
            process.wait()


@pytest.mark.slow
def test_a_rank_killed_in_a_run_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    command = [sys.executable, "launch/pretrain.py", *SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=run",
               "stage.phases.0.tokens=1024000", f"cluster.timeout_minutes={MINUTES}"]  # fmt: skip

    def start(rank: dict[str, str], log: Path) -> Popen:
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            return Popen(command, cwd=ROOT, env=environment() | rank, stdout=out, stderr=err)

    with started(2, folder, start) as run:
        run.wait_for("run/metrics.jsonl")
        time.sleep(3)  # for a beat that tells a step to be read
        run.ranks[1].kill()
        run.check_all_say(missing(run, 1), except_for=[1])


def _beside_torchrun(environment: dict[str, str], log: Path) -> StandIn:
    """The first process keeps the store in torchrun's place; the ranks are the others."""
    rank, world = int(environment["RANK"]) - 1, int(environment["WORLD_SIZE"]) - 1
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return StandIn(environment | own, log, serve if rank < 0 else train)


@pytest.mark.slow
def test_a_missing_rank_is_named_by_all_others_and_a_finished_one_is_not(tmp_path: Path) -> None:
    """All cases at once: they mostly wait."""
    cases = [(3, 1, signal.SIGKILL), (2, 0, signal.SIGKILL), (3, 1, signal.SIGSTOP), (2, 0, signal.SIGSTOP)]
    with ExitStack() as stack:
        # The last stays longer than a rank may be silent, and rank 0, which has the store, for its sake.
        stay = partial(StandIn, life=partial(train, steps=9, stay=10))
        whole = stack.enter_context(started(3, tmp_path / "whole", stay))
        torchrun = stack.enter_context(started(3, tmp_path / "torchrun", _beside_torchrun))
        long = partial(StandIn, life=train)
        runs = [stack.enter_context(started(case[0], tmp_path / str(i), long)) for i, case in enumerate(cases)]
        for run, (_, victim, how) in zip(runs, cases, strict=True):
            run.wait_for("0.out")
            run.ranks[victim].send_signal(how)
        torchrun.wait_for("1.out")
        torchrun.ranks[0].send_signal(signal.SIGSTOP)
        for run, (_, victim, _) in zip(runs, cases, strict=True):
            run.check_all_say(missing(run, victim), except_for=[victim])
        who = rf"torchrun of rank 0 of 2 \(pid {torchrun.ranks[1].pid} on \S+\) or its node is missing"
        torchrun.check_all_say(f"{who}: the store it keeps does not answer", except_for=[0])
        assert [process.wait(STOP_SECONDS) for process in whole.ranks] == [0, 0, 0]
        assert [whole.said(rank) for rank in range(3)] == ["", "", ""]


def test_a_rank_that_hangs_in_python_is_named_with_its_place_and_stacks(tmp_path: Path) -> None:
    """It beats on: the others know it by where it stands, and end when their collective gives up."""
    with started(3, tmp_path / "run", partial(StandIn, life=partial(train, stuck=1))) as run:
        pid = run.ranks[1].pid
        codes = [process.wait(STOP_SECONDS) for process in run.ranks]
        assert codes == [RankLost.EXIT_CODE] * 3, [run.said(rank) for rank in range(3)]
        place = rf"rank 1 of 3 \(pid {pid} on \S+\) at dist/stand_in\.py:\d+ hang; "
        place += r"ranks 0, 2 at dist/stand_in\.py:\d+ train, in all_reduce; "
        place += f"stacks of all ranks: {run.folder / 'stacks'}"
        assert re.search(rf"^warning: no step for \d+ s \(step {WARM}\): {place}$", run.said(0), re.M), run.said(0)
        for rank in (0, 2):
            said = run.said(rank)
            assert re.search(rf"^error on rank {rank}: .*step {WARM} did not end: {place}", said, re.M), said
        stacks = [(run.folder / f"stacks/rank-{rank:05d}.txt").read_text() for rank in range(3)]
        assert " in hang" in stacks[1] and all(" in train" in one for one in stacks) and " in hang" not in stacks[0]


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_collective_of_its_own_is_named_with_its_place(tmp_path: Path) -> None:
    with started(3, tmp_path / "run", partial(StandIn, life=partial(train, stuck=2, how="receive"))) as run:
        codes = [process.wait(STOP_SECONDS) for process in run.ranks]
        assert codes == [RankLost.EXIT_CODE] * 3, [run.said(rank) for rank in range(3)]
        place = rf"rank 2 of 3 \(pid {run.ranks[2].pid} on \S+\) at dist/stand_in\.py:\d+ receive, in \w+; "
        place += r"ranks 0, 1 at dist/stand_in\.py:\d+ train, in all_reduce; "
        assert re.search(rf"^warning: no step for \d+ s \(step {WARM}\): {place}", run.said(0), re.M), run.said(0)
        assert re.search(rf"^error on rank 0: .*step {WARM} did not end: {place}", run.said(0), re.M), run.said(0)


@pytest.mark.slow
def test_a_rank_that_crashes_or_holds_the_interpreter_is_missed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        runs = [stack.enter_context(started(2, tmp_path / how, partial(StandIn, life=partial(train, stuck=1, how=how))))
                for how in ("crash", "hold")]  # fmt: skip
        for run in runs:
            run.check_all_say(missing(run, 1), except_for=[1])
        assert runs[0].ranks[1].wait(1) == -signal.SIGSEGV
        crashed = runs[0].said(1)
        assert "Fatal Python error: Segmentation fault" in crashed and " in crash" in crashed


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("direct", [False, True], ids=["nccl", "direct"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_missing_rank_is_named_while_a_gpu_waits_for_it(tmp_path: Path, how: signal.Signals, direct: bool) -> None:
    with started(2, tmp_path / "run", partial(StandIn, life=partial(train, device="cuda", direct=direct))) as run:
        run.wait_for("0.out")
        run.ranks[1].send_signal(how)
        run.check_all_say(missing(run, 1), except_for=[1])


def guarded(body: Callable[[int], None]) -> str | None:
    """Run `body` of a rank in a guarded group; how its error left the watchdog."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        with mock.patch.object(watchdog, "UNWIND_SECONDS", 1e6), watchdog.Watchdog(MINUTES) as watched:
            watched.step = 7
            body(context.rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}, from {error.__cause__!r}"
    finally:
        mesh.stop()
    return None


def _fail_first_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such file")
    time.sleep(1)
    raise RuntimeError("connection closed by peer")  # as gloo would say


def test_a_rank_that_stopped_on_an_error_is_named_with_it(pool: Pool) -> None:
    first, second = pool.run(guarded, _fail_first_on_rank_1, world=2)
    assert second == "ValueError: no such file, from None"
    expected = r"RankLost: rank 1 of 2 .* stopped in step 7 on ValueError: no such file; .*, from RuntimeError\('conn"
    assert re.match(expected, first)


def _fail_on_both(rank: int) -> None:
    raise RuntimeError(f"own error of {rank}")


def test_an_error_goes_on_unchanged_while_all_others_beat(pool: Pool) -> None:
    errors = pool.run(guarded, _fail_on_both, world=2)
    assert errors == [f"RuntimeError: own error of {rank}, from None" for rank in range(2)]


def test_silence_does_not_count_while_this_process_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    times = iter([0.0, 1.0, 500.0, 501.0, 502.0])  # suspended for 499 s
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: next(times)))
    own = heartbeat.Heartbeat(interval=2.0)
    own.watch([1, 2], pause=2.0)
    own.heard[2] = heartbeat.Beat(state=heartbeat.LEFT)
    silent = []
    for _ in range(4):
        own.tick()
        silent.append(own.silent(patience=4.5))
    assert own.now == 1 + 2 + 1 + 1 and silent == [[], [], [], [1]]


def leave_together() -> tuple[str, str]:
    """What a rank says as it leaves a run that all ranks stop."""
    mesh.start(ClusterConfig(device="cpu"))
    guard = watchdog.Watchdog(MINUTES)
    try:
        with guard:
            raise RunStopped("asked for", 143)
    except RunStopped as stopped:
        return str(stopped), guard._heartbeat.own.state
    finally:
        mesh.stop()


def test_a_stop_that_ranks_share_is_no_failure_of_any(pool: Pool) -> None:
    assert pool.run(leave_together, world=2) == [("asked for", heartbeat.LEFT)] * 2

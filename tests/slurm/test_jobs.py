"""Runs as jobs of a real Slurm with two nodes, each a host of its own: all kinds of ends, and what follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.checkpoint.listing import all_checkpoints
from mmtrain.runs.slurm.submit import Chain
from tests.dist.runs import ROOT, environment, pretrain, steps
from tests.slurm.jobs import PARTS, cluster, nodes_are_idle, numbers, slurm, submit, wait

pytestmark = pytest.mark.slurm
NO_TEST = "cluster.preflight=false"  # which takes its time
LONG = "stage.token_scale=1000"


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The numbers of the run, trained without a break and without Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(*PARTS, f"data.path={corpus}", f"run.dir={folder}", "run.name=r", processes=2)
    return numbers(folder / "r")


def test_a_job_that_is_preempted_goes_on_to_the_same_end(corpus: Path, tmp_path: Path, whole: list[tuple]) -> None:
    job = submit(corpus, tmp_path, "r")
    job.wait_for_steps(3)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
    job.wait_for_restart()
    assert "stopped by SIGTERM after step" in job.log and len(steps(job.run)) < 48
    job.wait_for("COMPLETED")
    assert numbers(job.run) == whole
    assert "configuration " in job.log and "commit " in job.log  # the environment report
    assert "pre-flight: matrix: median" in job.log and "left out" not in job.log
    attempts = sorted(path.name for path in (job.run / "slurm").iterdir() if path.is_dir())
    assert attempts == [f"{job.ids[0]}-0", f"{job.ids[0]}-1"]
    logs = job.run / "slurm" / attempts[0]
    assert "layout  2 processes" in (logs / "rank-00000.log").read_text() and (logs / "rank-00001.log").exists()
    assert {path.read_text().strip() for path in (logs / "exit").iterdir()} == {"143"}
    # Two hosts are seen as such.
    assert "the 2 ranks of parallel.ep are not all on one host" in job.log


def test_a_cancelled_job_is_saved_and_stays_away(corpus: Path, tmp_path: Path) -> None:
    job = submit(corpus, tmp_path, "r", NO_TEST, LONG, "checkpoint.interval=0")
    job.wait_for_steps(2)
    slurm("scancel", job.ids[0])
    job.wait_for("CANCELLED")
    wait("the end of the script", lambda: "job: saved after step" in job.log)
    assert len(all_checkpoints(job.run / "checkpoints")) == 1
    assert job.state() == "CANCELLED" and not slurm("squeue", "--noheader")


def test_a_job_goes_on_after_one_of_its_nodes_is_lost(corpus: Path, tmp_path: Path, whole: list[tuple]) -> None:
    job = submit(corpus, tmp_path, "r", NO_TEST, "checkpoint.interval=2", "cluster.timeout_minutes=0.5")
    job.wait_for_steps(4)
    cluster("lose", "2")
    job.wait_for_restart()
    cluster("node", "2")
    wait("the node", nodes_are_idle)
    job.wait_for("COMPLETED")
    assert numbers(job.run) == whole
    starts = json.loads((job.run / "slurm/restarts.json").read_text())
    assert len(starts) > 1 and starts[1]["step"] > 0 and starts[-1]["ending"] == "finished"


def test_a_chain_goes_on_when_its_first_job_runs_out_of_time(corpus: Path, tmp_path: Path) -> None:
    stop = "run.max_steps=100000"
    job = submit(corpus, tmp_path, "r", NO_TEST, LONG, "checkpoint.interval=0", "cluster.time_limit='2:00'",
                 "cluster.signal_seconds=40", stop, chain=Chain(2))  # fmt: skip
    assert job.fact("Dependency", 1).startswith(f"afterok:{job.ids[0]}")
    job.wait_for("COMPLETED")  # with code 0, for the next one to start
    assert "a signal before the time limit" in job.log and "the next link of the chain goes on" in job.log
    done = len(steps(job.run))
    wait("a step of the second job", lambda: len(steps(job.run)) > done)
    assert job.state(1) == "RUNNING" and f"after step {done}" in job.log
    assert [row["step"] for row in steps(job.run)] == list(range(1, len(steps(job.run)) + 1))


def stand_in(tmp_path: Path, program: str = "sys.exit(3)") -> Path:
    """The folder of programs, with a run that only ends, by default as if it had lost a rank."""
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "slurm").symlink_to(ROOT / "launch/slurm")
    (launch / "pretrain.py").write_text(f"import os, sys\n{program}\n")
    return launch


def test_two_restarts_without_a_new_checkpoint_stop_a_chain(corpus: Path, tmp_path: Path) -> None:
    job = submit(corpus, tmp_path, "r", NO_TEST, chain=Chain(2), launch=stand_in(tmp_path))
    job.wait_for("FAILED")
    assert "2 restarts in a row brought no new checkpoint" in job.log and job.fact("Restarts") == "2"
    job.wait_for("CANCELLED", 1)


def test_a_task_of_an_array_goes_back_into_the_queue_alone(corpus: Path, tmp_path: Path) -> None:
    ends = (  # the first task has saved and hands over, the second one loses a rank once
        "again = os.environ.get('SLURM_RESTART_COUNT', '0') != '0'\n"
        "sys.exit(0 if again else {'1': 143, '2': 3}[os.environ['SLURM_ARRAY_TASK_ID']])"
    )
    chain = Chain(2, as_array=True)
    job = submit(corpus, tmp_path, "two words", NO_TEST, chain=chain, launch=stand_in(tmp_path, ends))
    job.ids = [f"{job.ids[0]}_{task}" for task in (1, 2)]
    job.wait_for("COMPLETED")
    job.wait_for("COMPLETED", 1)
    assert [job.fact("Restarts", task) for task in (0, 1)] == ["0", "1"]
    starts = json.loads((job.run / "slurm/restarts.json").read_text())
    assert [one["ending"] for one in starts] == ["hand_over", "requeue", "finished"]


def failing_node(tmp_path: Path) -> str:
    """The option with which n1 fails the pre-flight."""
    fault = tmp_path / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(  # n1 dies whenever a rank of the pre-flight measures there
        "import os, socket, sys\n"
        "if socket.gethostname() == 'n1' and 'mmtrain.health.preflight.worker' in ' '.join(sys.orig_argv):\n"
        "    os._exit(1)\n"
    )
    return f"cluster.setup=['export PYTHONPATH={fault}']"


def test_a_job_without_spare_nodes_comes_back_without_the_node_that_fails(corpus: Path, tmp_path: Path) -> None:
    job = submit(corpus, tmp_path, "r", "cluster.nodes=1", "parallel.ep=1", "run.max_steps=2", failing_node(tmp_path))
    job.wait_for("COMPLETED")
    assert "the job goes back into the queue without n1" in job.log and job.fact("ExcNodeList") == "n1"
    assert job.fact("Restarts") == "1" and len(steps(job.run)) == 2


def test_a_node_that_fails_the_preflight_is_replaced_by_a_spare_one(corpus: Path, tmp_path: Path) -> None:
    job = submit(corpus, tmp_path, "r", "cluster.nodes=1", "cluster.spare_nodes=1", "parallel.ep=1", "run.max_steps=2",
                 failing_node(tmp_path))  # fmt: skip
    job.wait_for("COMPLETED")
    assert "pre-flight: n1 is left out: rank 0 left no report" in job.log
    assert len(steps(job.run)) == 2 and "layout  1 process" in job.log
    assert slurm("scontrol", "show", "job", job.ids[0]).count("NodeList=n[1-2]") == 1


def srun(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "launch/pretrain.py", *PARTS, *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_tasks_of_srun_train_one_run(corpus: Path, tmp_path: Path, whole: list[tuple]) -> None:
    common = [f"data.path={corpus}", f"run.dir={tmp_path}"]
    done = srun(*common, "run.name=r", "run.max_steps=5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path / "r") == whole[:5]
    refused = srun(*common, "run.name=d", "parallel.exchange=direct")
    assert refused.returncode != 0
    assert "parallel.exchange=direct: the 2 ranks of parallel.ep are not all on one host" in refused.stderr

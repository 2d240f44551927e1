"""The launcher's variables: torchrun's, Slurm's, and those that are refused in one line."""

from __future__ import annotations

import pytest

from mmtrain.config.process_env import Processes, first_host, join_launcher, read_processes, speaking_rank
from mmtrain.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
            "MASTER_PORT": "29500"}  # fmt: skip
STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-008]"}  # fmt: skip
BATCH_SHELL = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8",
               "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_TASKS_PER_NODE": "4(x2)"}  # fmt: skip


def without(environment: dict[str, str], *names: str, **changes: str) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name not in names} | changes


def test_a_process_alone() -> None:
    alone = Processes(rank=0, world_size=1, local_rank=0, launcher="python", address=None)
    assert read_processes({}) == alone
    for step in ("", "batch", "4294967291", "4294967290"):  # what sbatch and salloc give their shells
        assert read_processes({**BATCH_SHELL, "SLURM_STEP_ID": step}) == alone
    assert read_processes(BATCH_SHELL) == alone
    one = without(STEP, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1")
    assert read_processes(one) == alone  # srun -n 1 in a job of 8 tasks


def test_torchrun_s_variables_win() -> None:
    found = read_processes({**STEP, **TORCHRUN, "OMPI_COMM_WORLD_SIZE": "3"})
    assert found == Processes(5, 8, 1, 4, "torchrun", address=("node0", 29500))
    bare = without(TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert read_processes(bare).local_rank is None and read_processes({**STEP, **bare}).local_rank == 1
    assert read_processes({**bare, "RANK": "0", "WORLD_SIZE": "1"}).local_rank == 0


def test_tasks_of_a_step_are_ranks() -> None:
    found = read_processes(STEP)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert found.launcher == "srun" and found.address[0] == "gpu007" and 15_000 <= found.address[1] < 30_000
    assert {read_processes({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).address[1]
            for job in ("4711", "4712") for step in "01"}.__len__() == 4  # fmt: skip
    assert read_processes({**STEP, "MASTER_ADDR": "login", "MASTER_PORT": "1234"}).address == ("login", 1234)
    one_node = without(STEP, "SLURM_NODEID", SLURM_STEP_TASKS_PER_NODE="8", SLURM_LOCALID="5")
    assert read_processes(one_node).address[0] == "127.0.0.1" and read_processes(one_node).local_world_size == 8
    assert read_processes({**one_node, "SLURM_DISTRIBUTION": "cyclic"}).rank == 5  # on one host any order is in a row
    uneven = without(STEP, SLURM_STEP_TASKS_PER_NODE="4,3,1")
    assert read_processes(uneven).local_world_size == 0
    job_only = without(STEP, "SLURM_STEP_NUM_TASKS", SLURM_NTASKS="8")
    assert read_processes(job_only).world_size == 8


@pytest.mark.parametrize(
    ("variables", "own"),
    [({}, False), ({"SLURM_GPUS_PER_TASK": "1"}, True), ({"SLURM_GPUS_PER_TASK": "h100:1"}, True),
     ({"SLURM_GPUS_PER_TASK": "2"}, False), ({"SLURM_TRES_PER_TASK": "cpu:8,gres/gpu:1"}, True),
     ({"SLURM_TRES_PER_TASK": "gres/gpu:h100:1"}, True), ({"SLURM_TRES_PER_TASK": "gres/gpu:12"}, False)],
)  # fmt: skip
def test_a_gpu_of_its_own(variables: dict[str, str], own: bool) -> None:
    assert read_processes({**STEP, **variables}).own_gpu is own


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu007", "gpu007"), ("gpu[007-010,12],cpu1", "gpu007"), ("a,b", "a"), ("gpu[12,14]", "gpu12"),
     ("rack[1-2]n[01-16]", "rack1n01"), ("n[3]-ib,x", "n3-ib"), ("", "")],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: set without RANK; unset it, or start it with torchrun"),
        ({"RANK": "0"}, "RANK=0: set without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: set without RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8: must be below WORLD_SIZE=8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1: must be a whole number from 0 on"),
        ({**TORCHRUN, "RANK": ""}, r"RANK=\(empty\): must be a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1 on"),
        ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE=eight: must be a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: is no port"),
        (without(TORCHRUN, "MASTER_ADDR"), r"MASTER_ADDR=\(missing\): RANK=5 and WORLD_SIZE=8 are set"),
        (without(TORCHRUN, "MASTER_PORT"), r"MASTER_PORT=\(missing\)"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: mpirun started 4 processes without RANK"),
        ({**STEP, "OMPI_COMM_WORLD_SIZE": "16"}, "OMPI_COMM_WORLD_SIZE=16: mpirun started 16"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: mpiexec started 2 processes"),
        ({"FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE=2: flux run started 2 processes"),
        ({**STEP, "SLURM_PROCID": "8"}, "SLURM_PROCID=8: must be below SLURM_STEP_NUM_TASKS=8"),
        (without(STEP, "SLURM_LOCALID"), r"SLURM_LOCALID=\(missing\)"),
        (
            {**STEP, "SLURM_DISTRIBUTION": "cyclic"},
            "SLURM_DISTRIBUTION=cyclic: ranks of a host must follow one another",
        ),
        ({**STEP, "SLURM_DISTRIBUTION": "plane=2"}, "SLURM_DISTRIBUTION=plane=2: ranks of a host must follow"),
        ({**STEP, "SLURM_LOCALID": "2"}, r"SLURM_DISTRIBUTION=\(missing\): ranks of a host must follow"),
        (without(STEP, "SLURM_STEP_NODELIST"), r"MASTER_ADDR=\(missing\): Slurm does not name"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_processes(environment)
    assert "\n" not in str(caught.value)


def test_slurm_s_own_pmi_is_no_other_launcher() -> None:
    assert read_processes({**STEP, "PMI_SIZE": "8", "PMI_RANK": "5"}).launcher == "srun"


def test_a_task_gets_torchrun_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)
    for name, text in STEP.items():
        monkeypatch.setenv(name, text)
    first = join_launcher()
    again = read_processes()
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size, again.address) == (
        first.rank, first.world_size, first.local_rank, first.local_world_size, first.address)  # fmt: skip


def test_who_speaks() -> None:
    assert speaking_rank({}) == 0 and speaking_rank({"RANK": "x"}) == 0
    assert speaking_rank(TORCHRUN) == speaking_rank(STEP) == 5
    assert speaking_rank({"OMPI_COMM_WORLD_RANK": "2", "SLURM_PROCID": "0"}) == 2

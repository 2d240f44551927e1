"""Processes of a run, as their launcher describes them in environment variables: the one place that reads these.

torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) come first, whoever set
them. Without them the tasks of an ``srun`` step are the ranks. Everything below works with torchrun's, which
:func:`join_launcher` therefore sets for the tasks of a step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmtrain.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_USUAL = "start it with torchrun --nproc-per-node N launch/pretrain.py ... or srun python launch/pretrain.py ..."
# Launchers whose processes have no torchrun variables: number of processes, rank, what starts them.
_OTHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpiexec"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "flux run"),
)
_FIRST_RESERVED_STEP = 0xFFFFFFF0  # Slurm numbers the shells of sbatch and salloc from here, which are no steps
_PORTS = range(15_000, 30_000)  # below those that systems give to connections


@dataclass(frozen=True)
class Processes:
    """Place of this process among those that the launcher started.

    Attributes:
        rank: number of this process among all, from 0.
        world_size: number of all processes.
        local_rank: number of this process on its host; None where the launcher does not say.
        local_world_size: processes of each host, one after another; 0 where the launcher does not say.
        launcher: ``python`` (one process), ``torchrun`` or whoever sets its variables, or ``srun``.
        own_gpu: the launcher shows each process a GPU of its own, its only one.
        address: host and port where the processes meet; None for a process that is alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_world_size: int = 1
    launcher: str = "python"
    own_gpu: bool = False
    address: tuple[str, int] | None = None


def read_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """Read the launcher's variables.

    Raises:
        ConfigError: they are incomplete, contradict each other, or are those of a launcher that is not known.
    """
    own_gpu = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1" or bool(
        re.search(r"gres[/:]gpu(:\w+)?[:=]1(,|$)", environment.get("SLURM_TRES_PER_TASK", ""))
    )
    if "RANK" in environment or "WORLD_SIZE" in environment or "LOCAL_RANK" in environment:
        return _torchrun(environment, own_gpu)
    for size, rank, launcher in _OTHERS[:2]:  # their processes inherit the variables of a Slurm task
        _refuse_other(environment, size, rank, launcher)
    if _in_step(environment):
        return _srun(environment, own_gpu)
    for size, rank, launcher in _OTHERS[2:]:
        _refuse_other(environment, size, rank, launcher)
    return Processes()


def join_launcher() -> Processes:
    """Set torchrun's variables for a task of an srun step, once, and return this process's place.

    Raises:
        ConfigError: see :func:`read_processes`.
    """
    processes = read_processes()
    if processes.launcher == "srun" and processes.address is not None:
        os.environ.update(
            RANK=str(processes.rank),
            WORLD_SIZE=str(processes.world_size),
            LOCAL_RANK=str(processes.local_rank),
            LOCAL_WORLD_SIZE=str(processes.local_world_size),
            MASTER_ADDR=processes.address[0],
            MASTER_PORT=str(processes.address[1]),
        )
    return processes


def speaking_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank for messages, also where the variables make no sense: 0 if nothing says otherwise."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID", *(rank for _, rank, _ in _OTHERS))
    texts = (environment[name] for name in names if name in environment)
    return next((int(text) for text in texts if text.isdecimal()), 0)


def _torchrun(environment: Mapping[str, str], own_gpu: bool) -> Processes:
    """Read torchrun's variables, of which RANK and WORLD_SIZE go together."""
    for name, beside in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK"), ("LOCAL_RANK", "RANK")):
        if name in environment and beside not in environment:
            raise ConfigError(name, environment[name], f"set without {beside}", f"unset it, or {_USUAL}")
    world = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    if rank >= world:
        raise ConfigError("RANK", rank, f"must be below WORLD_SIZE={world}", f"number ranks from 0, or {_USUAL}")
    local = _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else None
    if local is None:
        local = _number(environment, "SLURM_LOCALID", 0) if _in_step(environment) else 0 if world == 1 else None
    on_host = _number(environment, "LOCAL_WORLD_SIZE", 0) if "LOCAL_WORLD_SIZE" in environment else 0
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise ConfigError(name, "(missing)", f"RANK={rank} and WORLD_SIZE={world} are set, so ranks meet there",
                              f"export it with rank 0's host and a free port, or {_USUAL}")  # fmt: skip
    port = _number(environment, "MASTER_PORT", 0)
    if port > 65_535:
        raise ConfigError("MASTER_PORT", port, "is no port", "give one from 1024 to 65535")
    return Processes(rank, world, local, on_host, "torchrun", own_gpu, (environment["MASTER_ADDR"], port))


def _in_step(environment: Mapping[str, str]) -> bool:
    """Tell a task that srun started from the shell of sbatch or salloc, where SLURM_NTASKS counts what it may start."""
    step = environment.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environment and step.isdecimal() and int(step) < _FIRST_RESERVED_STEP


def _srun(environment: Mapping[str, str], own_gpu: bool) -> Processes:
    """Read the variables of a task of an srun step."""
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world = _number(environment, tasks, 1) if tasks in environment else 1
    rank = _number(environment, "SLURM_PROCID", 0)
    if world == 1:
        return Processes()
    if rank >= world:
        raise ConfigError("SLURM_PROCID", rank, f"must be below {tasks}={world}", _USUAL)
    if "SLURM_LOCALID" not in environment:
        raise ConfigError("SLURM_LOCALID", "(missing)", "srun sets it for each of its tasks", _USUAL)
    local, node = _number(environment, "SLURM_LOCALID", 0), environment.get("SLURM_NODEID", "0")
    per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    in_turn = environment.get("SLURM_DISTRIBUTION", "").startswith(("cyclic", "plane", "arbitrary"))
    if len(per_node) > 1 and node.isdecimal():
        in_turn = in_turn or rank != sum(per_node[: int(node)]) + local
    if in_turn and len(per_node) != 1:
        raise ConfigError("SLURM_DISTRIBUTION", environment.get("SLURM_DISTRIBUTION", "(missing)"),
                          "ranks of a host must follow one another", "give srun --distribution=block")  # fmt: skip
    on_host = per_node[0] if len(set(per_node)) == 1 else 0
    return Processes(rank, world, local, on_host, "srun", own_gpu, _meeting_place(environment, len(per_node)))


def _meeting_place(environment: Mapping[str, str], num_nodes: int) -> tuple[str, int]:
    """Return the step's first host and a port that follows from the job's and the step's number."""
    nodes = next((environment[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
                  if environment.get(name)), "")  # fmt: skip
    host = environment.get("MASTER_ADDR") or ("127.0.0.1" if num_nodes == 1 else first_host(nodes))
    if not host:
        raise ConfigError("MASTER_ADDR", "(missing)", "Slurm does not name the step's hosts",
                          "export MASTER_ADDR=HOST of rank 0")  # fmt: skip
    if "MASTER_PORT" in environment:
        return host, _number(environment, "MASTER_PORT", 1)
    job, step = environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"]
    seed = (int(job) if job.isdecimal() else 0) * 31 + int(step)
    return host, _PORTS[seed % len(_PORTS)]


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list such as ``gpu[007-010,12],cpu1`` or ``rack[1-2]n[01-16]``."""
    depth, end = 0, len(nodes)
    for i, letter in enumerate(nodes):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[:end]).strip()


def _tasks_per_node(text: str) -> list[int]:
    """Read ``4(x2),3`` as [4, 4, 3]; empty where it is not readable."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _refuse_other(environment: Mapping[str, str], size: str, rank: str, launcher: str) -> None:
    """Refuse processes of a launcher whose ranks would not know of each other (ConfigError)."""
    number = environment.get(size, "1")
    if number.isdecimal() and int(number) > 1:
        raise ConfigError(size, number, f"{launcher} started {number} processes without RANK and WORLD_SIZE, "
                          "which would train the same run each for itself",
                          f"{_USUAL}; or set {', '.join(TORCHRUN)} in each process (its rank is ${rank})")  # fmt: skip


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment[name].strip()
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(name, text or "(empty)", f"must be a whole number from {least} on", _USUAL)
    return int(text)

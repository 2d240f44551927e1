"""Options of the machine that a run uses, and of the jobs that run it there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, one_of
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError

A_YEAR_OF_MINUTES = 365 * 24 * 60
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")


@dataclass
class ClusterConfig:
    """Machine that a run uses, how long its ranks wait for each other, and, for launch/submit.py, the job it runs in.

    Attributes:
        device: ``auto`` (CUDA when there is one), ``cuda`` or ``cpu``.
        timeout_minutes: how long a collective may wait for a missing rank; a rank that shows no sign of life for half
            of it ends the run.
        device_memory_gib: memory of a device that predictions are held against; null asks the device. Give it to plan
            for a device that is not here, or a larger one than there is to start a run that is refused.
        host_memory_gib: memory of a host that predictions of host memory are held against, all of its ranks together;
            null asks the host where the device is a GPU.
        scheduler: what runs jobs: ``slurm``, or ``none`` where launch/submit.py has nothing to submit to.
        partition: Slurm's partition; null takes its default one.
        account: that the job is charged to; null leaves it out.
        qos: quality of service; null leaves it out.
        nodes: that the run computes on.
        spare_nodes: that the job gets beside these, so that one which fails the pre-flight is left out.
        gpus_per_node: GPUs of a node that the job asks for; 0 computes on CPUs.
        processes_per_node: ranks of a node; null: one a GPU, or one where there are none.
        cpus_per_task: cores of a node's one task, torchrun with all its ranks; null takes whole nodes.
        time_limit: of a job, as Slurm writes it (``90``, minutes; ``8:00:00``; ``2-00:00:00``); null: the partition's.
        signal_seconds: so long before the time limit the run is told to save and end.
        preflight: test all nodes before the run.
        environment: file of launch/slurm/environment/ with settings of NCCL and of the host, a reason each: ``h800``,
            ``cpu`` or ``none``.
        setup: lines of shell that a job runs first, such as `module load cuda` or `source .venv/bin/activate`.
        sbatch: further options of sbatch, such as ``--reservation=NAME``.
        srun: further options of the run's srun, such as ``--container-image=FILE``.
        shared_roots: folders that all nodes share; what a job reads and writes has to lie below one. Empty: the kind
            of file system tells whether it may be shared.
        log_folder: folder of a job's script and logs; null: `slurm` in the run's folder.
    """

    device: str = field(default="auto", metadata=one_of("auto", "cuda", "cpu"))
    timeout_minutes: float = field(default=10.0, metadata=above(0, A_YEAR_OF_MINUTES))
    device_memory_gib: float | None = field(default=None, metadata=above(0, fix="null asks the device"))
    host_memory_gib: float | None = field(default=None, metadata=above(0, fix="null asks the host"))
    scheduler: str = field(default="none", metadata=one_of("none", "slurm"))
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = field(default=1, metadata=at_least(1))
    spare_nodes: int = field(default=0, metadata=at_least(0, fix="0 asks for none"))
    gpus_per_node: int = field(default=0, metadata=at_least(0, fix="0 computes on CPUs"))
    processes_per_node: int | None = field(default=None, metadata=at_least(1, fix="null starts one a GPU"))
    cpus_per_task: int | None = field(default=None, metadata=at_least(1, fix="null takes whole nodes"))
    time_limit: str | None = None
    signal_seconds: int = field(default=300, metadata=at_least(0, 65535, fix="sbatch takes at most 65535"))
    preflight: bool = True
    environment: str = field(default="none", metadata=one_of("none", "cpu", "h800"))
    setup: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    shared_roots: list[str] = field(default_factory=list)
    log_folder: str | None = None

    @property
    def node_processes(self) -> int:
        """Ranks of a node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def limit_seconds(self) -> int | None:
        """Time limit of a job, in seconds; None where the partition's holds."""
        return None if self.time_limit is None else parse_time_limit(self.time_limit)

    def validate(self) -> None:
        """Refuse unknown devices, and options of a job that Slurm could not read."""
        check_allowed(self, "cluster")
        for option in ("sbatch", "srun"):
            for i, text in enumerate(getattr(self, option)):
                require(text.startswith("-") and "\n" not in text, f"cluster.{option}[{i}]", text,
                        f"must be one option of {option}", "for example --reservation=NAME")  # fmt: skip
        for option in ("partition", "account", "qos"):
            value = getattr(self, option)
            require(value is None or re.fullmatch(r"[\w.,@+-]+", value) is not None, f"cluster.{option}", repr(value),
                    "must be a name without spaces", "null leaves it out")  # fmt: skip
        for i, root in enumerate(self.shared_roots):
            require(root.startswith("/"), f"cluster.shared_roots[{i}]", root, "must be an absolute path", "from / on")
        limit = self.limit_seconds
        require(limit is None or limit > self.signal_seconds, "cluster.time_limit", self.time_limit,
                f"the run would be told to end {self.signal_seconds} s before it, at its start",
                "give a longer limit, or a smaller cluster.signal_seconds")  # fmt: skip


def parse_time_limit(text: str, option: str = "cluster.time_limit") -> int:
    """Read a time as Slurm writes it, in seconds: MIN, MIN:SEC, H:MIN:SEC, DAYS-H, DAYS-H:MIN or DAYS-H:MIN:SEC.

    Raises:
        ConfigError: it is none of these, or no time at all.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ConfigError(option, text, "is no time", "write minutes (90), H:MM:SS (8:00:00) or D-HH:MM:SS (2-0:00:00)")
    days, *parts = (None if part is None else int(part) for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*given, 0, 0)[:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:
        hours, (minutes, seconds) = 0, (*given, 0)[:2]
    total = ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    if total == 0:
        raise ConfigError(option, text, "is no time at all", "write minutes (90) or H:MM:SS (8:00:00)")
    return total

"""Runs of a sweep as Slurm jobs, one each, through submitit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.durable import write_text
from mmtrain.config import ClusterConfig, PretrainConfig
from mmtrain.config.sweep import SlurmConfig, SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.output import say
from mmtrain.runs.slurm.job_checks import read_paths, shared_lines
from mmtrain.runs.slurm.partitions import check_partition, read_partitions
from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.job import RunJob
from mmtrain.runs.sweep.process import place_of, run_command
from mmtrain.runs.sweep.state import SweepFolder

JOBS = "jobs.json"
MOST_TIMEOUTS = 1000  # of a job, each of which queues it again
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "FINISHED", "INTERRUPTED")


def check_jobs(launcher: Path, sweep: SweepConfig, folder: SweepFolder, configs: Sequence[PretrainConfig]) -> None:
    """Refuse jobs that the partition cannot run or that have too few GPUs, and folders that nodes do not share.

    Args:
        launcher: launch/pretrain.py.
        sweep: its options.
        folder: of the sweep.
        configs: of runs, one for each choice of corpora.

    Raises:
        ConfigError: the first of them, or there is no Slurm here.
    """
    if 0 < sweep.slurm.gpus < sweep.processes:
        raise ConfigError("sweep.slurm.gpus", sweep.slurm.gpus, f"a run has sweep.processes={sweep.processes}, a GPU "
                          "each", f"give sweep.slurm.gpus={sweep.processes}, or 0 for CPUs")  # fmt: skip
    try:
        partitions = read_partitions()
    except ConfigError as error:
        raise ConfigError("sweep.runner", sweep.runner, f"no Slurm here ({error.problem})",
                          "submit from a node with sbatch, or give sweep.runner=local") from error  # fmt: skip
    job = ClusterConfig(partition=sweep.slurm.partition, time_limit=str(sweep.slurm.minutes))
    try:
        check_partition(job, partitions)
    except ConfigError as error:
        option = {"partition": "partition", "time_limit": "minutes"}[error.option.removeprefix("cluster.")]
        raise ConfigError(f"sweep.slurm.{option}", error.value, error.problem, error.fix) from error
    for config in configs:
        paths = {"sweep.dir": str(folder.path.parent)} | read_paths(config, launcher.parent)
        shared_lines(paths, config.cluster.shared_roots)


def submit_runs(
    launcher: Path, sweep: SweepConfig, folder: SweepFolder, runs: Sequence[SweepRun], cluster: str = "slurm"
) -> dict[str, str]:
    """Submit a job for each run that has none in the queue or at work, and put its number on record.

    A job starts the run's launcher, torchrun where it has several processes, on one node. Before its time limit it lets
    the run save itself, and queues itself again; the run goes on from its newest checkpoint.

    Args:
        launcher: launch/pretrain.py.
        sweep: its options.
        folder: of the sweep; the caller holds its lock.
        runs: to start.
        cluster: of submitit; ``local`` and ``debug`` are for tests.

    Returns:
        the numbers of the jobs that were submitted, by run.

    Raises:
        ConfigError: submitit is not installed, there is no Slurm here, or Slurm refuses a job; those before stay.
    """
    submitit = _submitit()
    logs = folder.path / "jobs"
    folder.logs.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=str(logs), cluster=cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
    except RuntimeError as error:
        raise ConfigError("sweep.runner", sweep.runner, f"no Slurm here ({error})",
                          "submit from a node with sbatch, or give sweep.runner=local") from error  # fmt: skip
    executor.update_parameters(**_parameters(sweep.slurm, sweep.processes, folder.path.name, cluster))
    before = read_jobs(folder)
    submitted: dict[str, str] = {}
    for run in runs:
        if run.name in before and _is_alive(submitit, cluster, logs, before[run.name]):
            say(f"waits   {run.name}: job {before[run.name]}")
            continue
        command = run_command(launcher.resolve(), sweep, [*run.overrides, *place_of(folder, run)])
        folder.forget_outcome(run.name)
        job = _submit(executor, RunJob(command, folder, run.name))
        submitted[run.name] = str(job.job_id)
        write_text(folder.path / JOBS, json.dumps(before | submitted, indent=1) + "\n")
        say(f"job     {run.name}: {job.job_id}")
    return submitted


def read_jobs(folder: SweepFolder) -> dict[str, str]:
    """Return the newest job of each run."""
    path = folder.path / JOBS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("sweep.runner", "slurm", "needs the package submitit", "pip install submitit") from error
    return submitit


def _submit(executor: Any, job: RunJob) -> Any:
    """Submit a job; Slurm's refusal is told in its own words (ConfigError)."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.submit(job)
    except FailedJobError as error:
        told = " ".join(str(error).split()) or "no reason given"
        raise ConfigError("sweep.slurm", job.name, f"sbatch refuses the job: {told}",
                          "correct sweep.slurm.* and run the same command again") from error  # fmt: skip


def _is_alive(submitit: Any, cluster: str, logs: Path, number: str) -> bool:
    """Tell whether a job is in the queue or at work."""
    kinds = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob, "debug": submitit.DebugJob}
    return str(kinds[cluster](folder=str(logs), job_id=number).state).upper().split()[0] not in (*ENDED, "UNKNOWN")


def _parameters(slurm: SlurmConfig, processes: int, name: str, cluster: str) -> dict[str, Any]:
    """Return submitit's words for the options of a job."""
    found: dict[str, Any] = {"timeout_min": slurm.minutes, "gpus_per_node": slurm.gpus, "tasks_per_node": 1,
                             "nodes": 1, "cpus_per_task": slurm.cpus * processes, "name": name}  # fmt: skip
    if slurm.memory_gib is not None:
        found["mem_gb"] = slurm.memory_gib
    if cluster == "slurm":
        found |= {f"slurm_{key}": value for key, value in (("partition", slurm.partition), ("account", slurm.account))
                  if value is not None}  # fmt: skip
        if slurm.extra:
            found["slurm_additional_parameters"] = dict(_extra(line) for line in slurm.extra)
    return found


def _extra(line: str) -> tuple[str, str | bool]:
    name, equals, value = line.lstrip("-").partition("=")
    return name.replace("-", "_"), value if equals else True

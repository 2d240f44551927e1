"""Submission of a run as Slurm jobs: everything is checked, then written, then handed to sbatch.

:func:`prepare_job` touches nothing, :func:`submit_job` writes the script and submits it. Both are for programs that
start many runs too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.runs.slurm.job import job_folder
from mmtrain.runs.slurm.job_checks import shared_notes, time_notes
from mmtrain.runs.slurm.render import JobScript
from mmtrain.runs.slurm.shared_files import check_room
from mmtrain.train.epochs import tokens_by_phase
from mmtrain.train.inputs import RunInputs
from mmtrain.train.plan_run import PlannedRun, plan_run
from mmtrain.train.plan_table import plan_lines
from mmtrain.train.preference_checks import check_preference
from mmtrain.train.resume import decide_start, recorded_cp

SCRIPT = "job.sbatch"


@dataclass(frozen=True)
class Chain:
    """Jobs of one run, one after another.

    Attributes:
        length: how many; each goes on where the one before it ended.
        as_array: one job array, whose tasks run one at a time, instead of jobs that depend on each other.
        after: number of a job that has to end well first; None for none.
    """

    length: int = 1
    as_array: bool = False
    after: str | None = None


SINGLE = Chain()


@dataclass(frozen=True)
class PreparedJob:
    """A run that may be submitted.

    Attributes:
        planned: the run as it will be trained.
        scripts: one for each job; one alone for an array.
        chain: how they follow each other.
        folder: of scripts, logs and the record of starts.
        notes: lines on what was checked.
    """

    planned: PlannedRun
    scripts: tuple[JobScript, ...]
    chain: Chain
    folder: Path
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what ``--dry-run`` shows: the plan, what was checked, the first script, the commands."""
        commands = [" ".join(sbatch_command(self, i, f"JOB{i}" if i else None)) for i in range(len(self.scripts))]
        return [*plan_lines(self.planned), "", *self.notes, "", self.scripts[0].render(), *commands]


def prepare_job(
    arguments: Sequence[str], launch: Path, configs: Path, chain: Chain = SINGLE, ask_slurm: bool = True
) -> PreparedJob:
    """Check a run and the job that it is to run in. Nothing is written or submitted.

    Args:
        arguments: options of launch/pretrain.py, with `cluster=NAME`.
        launch: folder of the programs, with `slurm/` in it.
        configs: folder of YAML groups.
        chain: the jobs.
        ask_slurm: whether the cluster is at hand; without it its partitions are not checked.

    Raises:
        ConfigError: the first option that cannot work, of the run or of the job.
    """
    config = compose(list(arguments), configs)
    cluster = config.cluster
    if cluster.scheduler != "slurm":
        raise ConfigError("cluster.scheduler", cluster.scheduler, "there is nothing to submit to",
                          f"give one of {', '.join(_slurm(configs))}, or torchrun without Slurm")  # fmt: skip
    if chain.length < 1:
        raise ConfigError("--chain", chain.length, "must be at least 1", "1 submits a single job")
    if chain.after is not None and not re.fullmatch(r"\d+(_\d+)?", chain.after):
        raise ConfigError("--after", chain.after, "is no number of a job", "give one that sbatch or squeue printed")
    world = cluster.nodes * cluster.node_processes
    device = torch.device("cuda" if cluster.gpus_per_node else "cpu")
    if device.type == "cuda" and cluster.device_memory_gib is None:
        raise ConfigError("cluster.device_memory_gib", None, "this host has no GPU of the cluster to ask",
                          "give the memory of one of its GPUs in GiB")  # fmt: skip
    planned = plan_run(config, world, device, recorded_cp(config))
    planned.memory.check()
    check_preference(config)
    folder = RunFolder(config)
    if chain.after is None:
        decide_start(config, folder)  # refuses a run that is there already, and weights that do not fit
    else:
        folder.resume_from(lambda line: None)  # the job before may yet write the weights that it starts from
    notes = [*time_notes(config, ask_slurm), *shared_notes(config, launch)]
    notes += [check_room(config), *_text_notes(planned)]
    logs = job_folder(config).absolute()
    script = JobScript(cluster, f"mmtrain-{config.run.name}", launch.resolve(), configs.resolve(), Path.cwd(), logs,
                       tuple(arguments), None if chain.as_array else 1, chain.length,
                       Path(sys.executable).parent)  # fmt: skip
    count = 1 if chain.as_array else chain.length
    scripts = (script,) if chain.as_array else tuple(replace(script, link=i + 1) for i in range(count))
    return PreparedJob(planned, scripts, chain, logs, tuple(notes))


def _text_notes(planned: PlannedRun) -> list[str]:
    """Refuse corpora that the run could not read, or would read too often: not after the job's time in the queue.

    Raises:
        ConfigError, DataError: the first of them.
    """
    config = planned.config
    inputs = RunInputs(config.data, planned.phases, config.model.vocab_size)
    inputs.check_epochs(tokens_by_phase(planned.plan, config.run.max_steps))
    return [*inputs.notes, *inputs.check_images(config.model)]


def submit_job(prepared: PreparedJob) -> list[str]:
    """Write the scripts beside the run and submit them, each behind the one before; returns the jobs' numbers.

    Raises:
        ConfigError: sbatch refuses one; those that were submitted before it are cancelled.
    """
    prepared.folder.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    for i, script in enumerate(prepared.scripts):
        script_path(prepared, i).write_text(script.render(), encoding="utf-8")
        command = sbatch_command(prepared, i, ids[-1] if ids else None)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if ids:
                subprocess.run(["scancel", *ids], capture_output=True, check=False)
            said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])
            raise ConfigError("cluster.scheduler", "slurm", f"sbatch refuses the job: {said}",
                              f"see {script_path(prepared, i)}")  # fmt: skip
        ids.append(done.stdout.strip().partition(";")[0])
    return ids


def script_path(prepared: PreparedJob, index: int) -> Path:
    """Return where the script of a job is written."""
    return prepared.folder / (SCRIPT if len(prepared.scripts) == 1 else f"job-{index + 1}.sbatch")


def sbatch_command(prepared: PreparedJob, index: int, before: str | None) -> list[str]:
    """Return the command that submits a job of the chain.

    Args:
        prepared: the chain.
        index: of the job, from 0.
        before: number of the job before it; None for the first.
    """
    behind = before or prepared.chain.after
    # A job that stopped the chain ends with a code, and Slurm then removes those that wait for it.
    order = [] if behind is None else [f"--dependency=afterok:{behind}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *order, str(script_path(prepared, index))]


def _slurm(configs: Path) -> list[str]:
    found = sorted(path.stem for path in (configs / "cluster").glob("*.yaml"))
    return [f"cluster={name}" for name in found if name != "local"]

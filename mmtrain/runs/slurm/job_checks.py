"""Checks of a job against its cluster and its run, each with a line on what it found."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.runs.slurm.partitions import check_partition, read_partitions
from mmtrain.runs.slurm.shared_files import check_shared

_STEPS = 100  # of the run's last ones, whose median tells how long a step takes


def partition_notes(config: PretrainConfig, ask_slurm: bool) -> list[str]:
    """Refuse a job that its partition cannot run; without `ask_slurm` a Slurm that does not answer is no obstacle."""
    try:
        partitions = read_partitions()
    except ConfigError as error:
        if ask_slurm:
            raise
        return [f"note: partition and limits were not checked: {error.problem}"]
    chosen = check_partition(config.cluster, partitions)
    return [f"partition {chosen.name}: {chosen.nodes} nodes, {config.cluster.nodes} and "
            f"{config.cluster.spare_nodes} spare asked for"]  # fmt: skip


def interval_notes(config: PretrainConfig) -> list[str]:
    """Refuse a job that is shorter than the time between two checkpoints, where the run's own steps tell that time."""
    limit, interval, step = config.cluster.limit_seconds, config.checkpoint.interval, _step_seconds(config)
    if limit is None or not interval:
        return []
    if step is None:
        return ["note: how long a step takes is not known yet; a job should last for several checkpoint.interval"]
    if limit - config.cluster.signal_seconds < interval * step:
        raise ConfigError("cluster.time_limit", config.cluster.time_limit, "is shorter than one checkpoint.interval: "
                          f"{interval} steps of {step:.3g} s, beside the {config.cluster.signal_seconds} s for saving",
                          "give a longer limit, or a smaller checkpoint.interval")  # fmt: skip
    return [f"a checkpoint every {interval * step / 60:.3g} minutes ({interval} steps of {step:.3g} s)"]


def _step_seconds(config: PretrainConfig) -> float | None:
    """Return the median time of the run's last steps; None for a run that has none."""
    path = Path(config.run.dir) / config.run.name / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[-2 * _STEPS :]
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    times = [record["step_s"] for record in records if record.get("step_s")]
    return statistics.median(times[-_STEPS:]) if times else None


def shared_notes(config: PretrainConfig, launch: Path) -> list[str]:
    """Check every folder that the nodes of a job read or write."""
    paths = {"run.dir": config.run.dir, "launch": str(launch.resolve())}
    paths |= {f"data.sources[{i}].path" if config.data.sources else "data.path": one.path
              for i, one in enumerate(config.data.all_sources)}  # fmt: skip
    if config.cluster.log_folder:
        paths["cluster.log_folder"] = config.cluster.log_folder
    if config.run.init_from:
        paths["run.init_from"] = config.run.init_from
    for option, path in paths.items():
        if option.startswith("data.") and not Path(path).exists():
            raise ConfigError(option, path, "is not there", "prepare a corpus with launch/prepare.py")
    return [check_shared(option, path, config.cluster.shared_roots) for option, path in paths.items()]

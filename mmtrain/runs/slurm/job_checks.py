"""Checks of a job against its cluster and its run, each with a line on what it found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.runs.slurm.partitions import check_partition, read_partitions
from mmtrain.runs.slurm.shared_files import check_shared
from mmtrain.train.source_tokenizers import named_sources

_STEPS = 100  # of the run's last ones, whose median tells how long a step takes


def time_notes(config: PretrainConfig, ask_slurm: bool) -> list[str]:
    """Refuse a job that its partition cannot run, or that would end before its first checkpoint.

    Args:
        config: of the run and its job.
        ask_slurm: false: a Slurm that does not answer is no obstacle.
    """
    try:
        partitions = read_partitions()
    except ConfigError as error:
        if ask_slurm:
            raise
        unchecked = f"note: partition and limits were not checked: {error.problem}"
        return [unchecked, *_interval_notes(config, config.cluster.limit_seconds)]
    chosen = check_partition(config.cluster, partitions)
    said = (f"partition {chosen.name}: {chosen.nodes} nodes, {config.cluster.nodes} and "
            f"{config.cluster.spare_nodes} spare asked for")  # fmt: skip
    limit = chosen.usual if config.cluster.time_limit is None else config.cluster.limit_seconds
    return [said, *_interval_notes(config, limit)]


def _interval_notes(config: PretrainConfig, limit: int | None) -> list[str]:
    """Refuse a job that is shorter than the time between two checkpoints, where the run's own steps tell that time.

    Args:
        limit: seconds of the job; None for no limit.
    """
    interval, step = config.checkpoint.interval, _step_seconds(config)
    if limit is None or not interval:
        return []
    if step is None:
        return ["note: how long a step takes is not known yet; a job should last for several checkpoint.interval"]
    if limit - config.cluster.signal_seconds < interval * step:
        given = config.cluster.time_limit
        whose = "" if given is not None else f"the partition's {limit / 60:g} minutes: "
        raise ConfigError("cluster.time_limit", given, f"{whose}is shorter than one checkpoint.interval: "
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
    written = {"run.dir": config.run.dir}
    if config.cluster.log_folder:
        written["cluster.log_folder"] = config.cluster.log_folder
    return shared_lines(written | read_paths(config, launch), config.cluster.shared_roots)


def read_paths(config: PretrainConfig, launch: Path) -> dict[str, str]:
    """Return every folder that a run reads, by the option that names it."""
    paths = {"launch": str(launch.resolve())}
    paths |= {option: source.path for option, source in named_sources(config.data, config.stage.phases)}
    starts = {"run.init_from": config.run.init_from, "run.init_eyes": config.run.init_eyes}
    return paths | {option: path for option, path in starts.items() if path}


def shared_lines(paths: Mapping[str, str], roots: Sequence[str]) -> list[str]:
    """Return a line on each folder, or refuse one that other nodes cannot see, and a corpus that is not there.

    Args:
        paths: by the option that names each.
        roots: `cluster.shared_roots`.
    """
    for option, path in paths.items():
        if option.startswith(("data.", "stage.")) and not Path(path).exists():
            raise ConfigError(option, path, "is not there", "prepare a corpus with launch/prepare.py")
    return [check_shared(option, path, roots) for option, path in paths.items()]

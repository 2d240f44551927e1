"""Partitions of a Slurm cluster, as sinfo tells them, and what a job may ask of one."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from mmtrain.config import ClusterConfig
from mmtrain.config.cluster import parse_time_limit
from mmtrain.errors import ConfigError, nearest

SINFO_SECONDS = 30.0


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes:
        name: as `--partition` takes it.
        is_default: whether jobs without a partition go there.
        limit: longest time of a job in seconds; None for no limit.
        usual: time of a job that asks for none, in seconds; None for no limit.
        nodes: how many it has, those that are down too.
    """

    name: str
    is_default: bool
    limit: int | None
    usual: int | None
    nodes: int


def read_partitions() -> list[Partition]:
    """Ask sinfo.

    Raises:
        ConfigError: there is no Slurm here, or it does not answer.
    """
    for program in ("sinfo", "sbatch"):
        if shutil.which(program) is None:
            raise ConfigError("cluster.scheduler", "slurm", f"there is no {program} on the PATH here",
                              "submit from a login node of the cluster, or look at the job with --dry-run")  # fmt: skip
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%P|%l|%L|%D"], capture_output=True, text=True,
                              timeout=SINFO_SECONDS, check=False)  # fmt: skip
        said = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        said = f"no answer for {SINFO_SECONDS:.0f} s"
    if said:
        raise ConfigError("cluster.scheduler", "slurm", f"sinfo fails: {said.splitlines()[0]}", "is slurmctld up?")
    return parse_partitions(done.stdout)


def parse_partitions(text: str) -> list[Partition]:
    """Read lines such as ``debug*|1:00:00|n/a|2``; one partition may have several, of nodes in several states."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, longest, usual, nodes = line.split("|")
        plain, before = name.rstrip("*"), found.get(name.rstrip("*"))
        count, limit = int(nodes) + (before.nodes if before else 0), _seconds(longest)
        # Without a usual time of its own a partition gives its longest.
        found[plain] = Partition(plain, name.endswith("*"), limit, limit if usual == "n/a" else _seconds(usual), count)
    return list(found.values())


def _seconds(text: str) -> int | None:
    return None if text in ("infinite", "n/a") else parse_time_limit(text)


def check_partition(cluster: ClusterConfig, partitions: list[Partition]) -> Partition:
    """Return the partition of a job, or refuse what it does not offer.

    Raises:
        ConfigError: there is no such partition, or it has fewer nodes or a shorter limit than the job asks for.
    """
    names = [one.name for one in partitions]
    if cluster.partition is None:
        chosen = next((one for one in partitions if one.is_default), None)
        if chosen is None:
            raise ConfigError("cluster.partition", None, "this cluster has no default one",
                              f"give one of {', '.join(names)}")  # fmt: skip
    else:
        chosen = next((one for one in partitions if one.name == cluster.partition), None)
        if chosen is None:
            raise ConfigError("cluster.partition", cluster.partition, "this cluster has none of that name",
                              nearest(cluster.partition, names))  # fmt: skip
    wanted = cluster.nodes + cluster.spare_nodes
    if wanted > chosen.nodes:
        spare = f" and {cluster.spare_nodes} spare" if cluster.spare_nodes else ""
        raise ConfigError("cluster.nodes", cluster.nodes, f"partition {chosen.name} has {chosen.nodes} nodes, and "
                          f"the job asks for {cluster.nodes}{spare}", "ask for fewer")  # fmt: skip
    limit = cluster.limit_seconds
    if limit is not None and chosen.limit is not None and limit > chosen.limit:
        raise ConfigError("cluster.time_limit", cluster.time_limit, f"jobs in partition {chosen.name} end after "
                          f"{chosen.limit / 60:g} minutes", "give less: the job goes on after it")  # fmt: skip
    return chosen

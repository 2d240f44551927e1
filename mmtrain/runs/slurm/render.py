"""Job scripts: the template of launch/slurm/ with the options of one run in its two marked blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import ClusterConfig
from mmtrain.errors import ConfigError

TEMPLATE = "pretrain.sbatch"
KILL_MARGIN_SECONDS = 30  # before the time limit: the ranks that have not saved by then are ended


@dataclass(frozen=True)
class JobScript:
    """What a job script is made of, beside the template.

    Attributes:
        cluster: the job's options.
        name: of the job, as the queue shows it.
        launch: folder of the programs, with `slurm/` in it.
        configs: folder of YAML groups.
        root: folder that the job runs in, which relative paths start from.
        folder: of logs and of the record of starts.
        arguments: of launch/pretrain.py.
        link: place in a chain, from 1; None leaves it to an array.
        links: length of the chain.
        programs: folder of the Python that the job runs with; None: that of its PATH.
    """

    cluster: ClusterConfig
    name: str
    launch: Path
    configs: Path
    root: Path
    folder: Path
    arguments: Sequence[str]
    link: int | None = 1
    links: int = 1
    programs: Path | None = None

    def render(self) -> str:
        """Return the text of the script.

        Raises:
            ConfigError: the template is not there, or lacks a block.
        """
        path = self.launch / "slurm" / TEMPLATE
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError("cluster.scheduler", "slurm", f"{path} cannot be read: {error.strerror}",
                              "restore it, or install mmtrain anew") from error  # fmt: skip
        text = _replaced(text, "options of sbatch", self._sbatch_lines(), path)
        text = _replaced(text, "settings", self._settings(), path)
        return _replaced(text, "setup", self.cluster.setup, path)

    def _sbatch_lines(self) -> list[str]:
        cluster = self.cluster
        log = "%A_%a" if self.link is None else "%j"
        options = [
            f"--job-name={self.name}",
            f"--nodes={cluster.nodes + cluster.spare_nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={cluster.cpus_per_task}" if cluster.cpus_per_task else "--exclusive",
            f"--gpus-per-node={cluster.gpus_per_node}" if cluster.gpus_per_node else "",
            f"--partition={cluster.partition}" if cluster.partition else "",
            f"--account={cluster.account}" if cluster.account else "",
            f"--qos={cluster.qos}" if cluster.qos else "",
            f"--time={cluster.time_limit}" if cluster.time_limit else "",
            f"--chdir={self.root}",
            f"--output={self.folder / f'job-{log}.out'}",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:USR1@{cluster.signal_seconds}" if cluster.signal_seconds else "",
            f"--array=1-{self.links}%1" if self.link is None else "",
        ]
        quoted = [shlex.quote(option) for option in options if option]  # names and folders may have spaces
        return [f"#SBATCH {option}" for option in [*quoted, *cluster.sbatch]]

    def _settings(self) -> list[str]:
        cluster = self.cluster
        values = {
            "ROOT": self.root,
            "SCRIPTS": self.launch / "slurm",
            "PROGRAMS": self.programs or "",
            "CODE": self.launch.parent,
            "CONFIGS": self.configs,
            "PRETRAIN": self.launch / "pretrain.py",
            "NODES": cluster.nodes,
            "PROCESSES": cluster.node_processes,
            "GPUS": cluster.gpus_per_node,
            "ENVIRONMENT": cluster.environment,
            "PREFLIGHT": "true" if cluster.preflight else "false",
            "LOGS": self.folder,
            "SHUTDOWN_SECONDS": max(1, cluster.signal_seconds - KILL_MARGIN_SECONDS),
        }
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
        if self.link is None:
            lines += ["LINK=$SLURM_ARRAY_TASK_ID", f"LINKS={self.links}"]
        else:
            lines += [f"LINK={self.link}", f"LINKS={self.links}"]
        lines.append(f"SRUN=({' '.join(shlex.quote(option) for option in cluster.srun)})")
        return [*lines, "set -- \\", *(f"  {shlex.quote(one)} \\" for one in self.arguments[:-1]),
                f"  {shlex.quote(self.arguments[-1])}"]  # fmt: skip


def _replaced(text: str, block: str, lines: Sequence[str], path: Path) -> str:
    """Return the text with other lines between the two marks of a block."""
    marks = re.compile(rf"(^# >>> {block}\n).*?(^# <<< {block}$)", re.M | re.S)
    if len(marks.findall(text)) != 1:
        raise ConfigError("cluster.scheduler", "slurm", f"{path} has no block '# >>> {block}' ... '# <<< {block}'",
                          "restore the template")  # fmt: skip
    body = "".join(f"{line}\n" for line in lines)
    return marks.sub(lambda found: found[1] + body + found[2], text)

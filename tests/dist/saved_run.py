"""A run that has saved checkpoints, and copies of it to damage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from tests.checkpoint.fake import CONFIGS
from tests.dist.runs import SMALL, pretrain


@dataclass(frozen=True)
class SavedRun:
    """A run of three steps on two ranks, with a checkpoint of each."""

    folder: Path
    options: list[str]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"runs/r/checkpoints/step-{step:08d}"

    def config(self, *overrides: str) -> PretrainConfig:
        given = [*self.options, f"run.dir={self.folder}/runs", "run.resume=auto", "parallel.cp=1", *overrides]
        return compose(given, CONFIGS)

    def copy(self, folder: Path) -> SavedRun:
        shutil.copytree(self.folder / "runs", folder / "runs")
        return SavedRun(folder, self.options)


def save_run(corpus: Path, folder: Path, *more: str) -> SavedRun:
    """Train three steps on two ranks."""
    options = [*SMALL, f"data.path={corpus}", "run.name=r", "checkpoint.interval=1", "checkpoint.keep=0", *more]
    made = SavedRun(folder, options)
    pretrain(*options, f"run.dir={folder}/runs", "run.max_steps=3", processes=2)
    return made

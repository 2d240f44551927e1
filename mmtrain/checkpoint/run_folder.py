"""The folder of a run: its configuration, metrics and checkpoints, and whether a new launch may go on in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.config.option_marks import FREE_ON_RESUME, is_marked
from mmtrain.errors import ConfigError

_DONE = "meta.json"  # written last: a checkpoint folder without it was cut short


class RunFolder:
    """Paths of one run. Nothing is written before :meth:`claim`."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = self.path / "checkpoints"

    def resume_from(self) -> Path | None:
        """Return the checkpoint to go on from, or None for a fresh start.

        Raises:
            ConfigError: the folder holds a run that `run.resume` does not allow to touch, or one with other options.
        """
        resume, recorded = self.config.run.resume, self.path / "config.json"
        if resume not in ("never", "auto"):
            chosen = latest_checkpoint(Path(resume))
            if chosen is None:
                raise ConfigError("run.resume", resume, "holds no complete checkpoint", "use auto, never or its folder")
            if recorded.exists():
                self._refuse_other_options(recorded)
            return chosen
        if not recorded.exists():
            return None
        self._refuse_other_options(recorded)
        if resume == "never":
            raise ConfigError("run.name", self.config.run.name, f"{self.path} already holds this run",
                              "give run.resume=auto to go on with it, or another run.name")  # fmt: skip
        return latest_checkpoint(self.path)

    def claim(self) -> None:
        """Make the folder and record the configuration; on the main process only."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        scratch = self.path / "config.json.tmp"
        scratch.write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        os.replace(scratch, self.path / "config.json")

    def _refuse_other_options(self, recorded: Path) -> None:
        before = dict(_flatten(json.loads(recorded.read_text())))
        now = dict(_flatten(json.loads(json.dumps(asdict(self.config)))))
        for option in sorted(before.keys() | now.keys()):
            if before.get(option) != now.get(option) and not is_marked(PretrainConfig, option, FREE_ON_RESUME):
                raise ConfigError(option, now.get(option), f"{self.path} holds a run with {before.get(option)}",
                                  "give that value, or another run.name")  # fmt: skip


def latest_checkpoint(path: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or `path` itself when it is one; None without any."""
    if (path / _DONE).is_file():
        return path
    complete = complete_checkpoints(path / "checkpoints")
    return complete[-1] if complete else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first: neither one cut short nor one that is being replaced."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted((path for path in named if (path / _DONE).is_file()), key=lambda path: int(path.name[5:]))


def _flatten(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, values

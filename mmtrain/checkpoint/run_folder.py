"""The folder of a run: its configuration, metrics and checkpoints, and what a new launch goes on from in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtrain.checkpoint.abandon import METRICS, set_aside
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.durable import write_text
from mmtrain.checkpoint.listing import all_checkpoints, find_checkpoint, newest_checkpoint, remove_leftovers, step_of
from mmtrain.checkpoint.lock import BEAT_SECONDS, STALE_SECONDS, RunLock
from mmtrain.checkpoint.recorded_options import NOTHING, differences, recorded_values
from mmtrain.config import PretrainConfig
from mmtrain.config.option_marks import LAYOUT, is_marked
from mmtrain.errors import ConfigError

_CONFIG = "config.json"
_UNSET = (None, NOTHING)  # of an option in a group that one side does not have
TOKENIZER = "tokenizer"
"""Folder of the tokenizer, in a run folder and in a checkpoint: what was trained can be read without its corpus."""


@dataclass(frozen=True)
class Start:
    """What a launch begins with.

    Attributes:
        resume: the checkpoint that the run goes on from; None for a run from its first step.
        weights: the checkpoint of another run whose weights a run from its first step takes; None for initial ones.
        parts: patterns of what is taken of these weights; empty takes all.
        eyes: the checkpoint or Hugging Face folder whose eyes a run from its first step takes; None takes those of
            `weights`, or initial ones.
        notes: lines that tell what was decided.
    """

    resume: Path | None = None
    weights: Path | None = None
    parts: tuple[str, ...] = ()
    eyes: Path | None = None
    notes: tuple[str, ...] = ()


class RunFolder:
    """Paths of one run. Nothing is written before :meth:`locked`, and nothing but the lock before :meth:`claim`."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self._lock: RunLock | None = None

    def resume_from(self, note: Callable[[str], None], check: Callable[[Path], str | None] = damage_of) -> Path | None:
        """Return the checkpoint that `run.resume` names, or None for a run from its first step.

        Args:
            note: is told, in a line, of damaged checkpoints that were passed over.
            check: returns what is damaged of a checkpoint, None for a whole one.

        Raises:
            ConfigError: the folder holds a run that `run.resume` does not allow to touch, or only damaged checkpoints.
        """
        resume = self.config.run.resume
        if resume == "auto":
            return newest_checkpoint("run.resume", self.path, note, check)
        if resume != "never":
            return find_checkpoint("run.resume", resume, note, check)
        if all_checkpoints(self.checkpoints):
            raise ConfigError("run.name", self.config.run.name, f"{self.path} already holds this run",
                              "give run.resume=auto to go on with it, or another run.name")  # fmt: skip
        return None

    @contextmanager
    def locked(self, note: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder's lock, on the main process for all; a context. Collective at its entry.

        Args:
            note: is told, in a line, of a lock that is watched or was taken over; on the main process only.

        Raises:
            ConfigError: another launch holds it, or the folder cannot be written.
        """
        half_a_timeout = 30 * self.config.cluster.timeout_minutes  # the other ranks wait meanwhile
        lock = RunLock(self.path, note, patience=min(STALE_SECONDS + BEAT_SECONDS, half_a_timeout))
        with ExitStack() as held:

            def take() -> None:
                held.enter_context(lock)
                self._lock = lock
                remove_leftovers(self.checkpoints)

            on_main(take)
            yield

    def check_lock(self) -> None:
        """Refuse to go on if another launch has taken the folder over (LockLost); on the main process."""
        if self._lock is not None:
            self._lock.check()

    def claim(self, start: Start, record: Callable[[Path], None] = lambda folder: None) -> list[str]:
        """Make the folder this launch's: set aside what it does not go on with, and record the configuration.

        Collective; every rank gets the lines that say what was set aside.

        Args:
            start: what this launch begins with.
            record: writes what else belongs into the folder; called on the main process.

        Raises:
            ConfigError: the folder cannot be written.
        """
        return on_main(lambda: self._claim(start, record))

    def set_aside_after(self, step: int) -> str | None:
        """Set aside what the run did after a step that it goes back to; returns a line on it. Collective.

        Raises:
            OSError: it cannot be moved; on all ranks.
        """
        return on_main(lambda: set_aside(self.path, step, always=True))

    def _claim(self, start: Start, record: Callable[[Path], None]) -> list[str]:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lines = [self._set_aside(start)]
            write_text(self.path / _CONFIG, json.dumps(asdict(self.config), indent=1) + "\n")
            record(self.path)
        except OSError as error:
            raise ConfigError("run.dir", self.config.run.dir, f"cannot be written: {error.strerror} ({error.filename})",
                              "make room or mend the rights there, or give another run.dir") from error  # fmt: skip
        return [line for line in lines if line is not None]

    def _set_aside(self, start: Start) -> str | None:
        """Set aside another branch, another run's history, or the metrics of a start that saved nothing."""
        if start.resume is None:  # an aborted start; the same one again writes its few steps again
            again = self.config.run.resume == "auto" and self._is_recorded()
            return None if again else set_aside(self.path, -1, always=True)
        if start.resume.resolve().parent == self.checkpoints.resolve():
            return set_aside(self.path, step_of(start.resume))
        return set_aside(self.path, -1, always=(self.path / METRICS).exists())

    def _is_recorded(self) -> bool:
        """Whether the folder's record says what this launch's options say; the layout may be that of other ranks."""
        try:
            recorded = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return all(
            is_marked(PretrainConfig, one.option, LAYOUT) or (one.before in _UNSET and one.now in _UNSET)
            for one in differences(recorded_values(recorded), self.config)
        )

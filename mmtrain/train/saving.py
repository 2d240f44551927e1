"""Saving of a run as it trains: one that fails is told, and costs the run no more than that checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.corpora import ENTRY
from mmtrain.checkpoint.listing import remove_leftovers, remove_old
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.rank_writer import RankWriter
from mmtrain.checkpoint.run_folder import TOKENIZER, RunFolder
from mmtrain.checkpoint.save import PendingSave, SaveFailed, begin_save, most_bytes
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.config import PretrainConfig
from mmtrain.train.inputs import RunInputs
from mmtrain.train.report import Report
from mmtrain.train.session import Session


class Saver:
    """Writer of a run's checkpoints, which removes old ones once the newest is known to be good.

    A checkpoint is written beside the steps that follow it, and gets its name between two of them, when all ranks have
    written their part; there is one at a time. The last one of a run, and that of a boundary, is waited for.

    Args:
        folder: the run's folder, which this launch holds.
        config: every option of the run.
        inputs: the run's corpora and tokenizer; a checkpoint keeps a record of the former and the latter itself.
        report: where it is told.
        copy: what :func:`begin_copy` returned of the first session, or of none yet.

    Attributes:
        newest: step and folder of the newest checkpoint that holds what the run has now, or had when it was saved.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: PretrainConfig,
        inputs: RunInputs,
        report: Report,
        copy: StagingBuffer | None = None,
    ) -> None:
        self._folder, self._config, self._inputs, self._report = folder, config, inputs, report
        self.newest: tuple[int, Path] | None = None
        self._unconfirmed = True  # whether no step has used the weights of the newest checkpoint yet
        self._copy = copy
        self._writer = RankWriter()
        self._pending: tuple[int, PendingSave] | None = None
        self._stalled = 0.0  # seconds that the pending one has held the steps up
        self._has_failed = False  # since the last that was written: a disk that cannot be written keeps what was begun

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its part of a checkpoint."""
        return self._pending is not None and self._pending[1].is_writing

    def let_go(self) -> None:
        """Return once weights and moments may change: a checkpoint that is being written has its copy of them."""
        if self._pending is not None:
            began = time.perf_counter()
            self._pending[1].let_go()
            self._stalled += time.perf_counter() - began

    def save(
        self,
        session: Session,
        progress: Progress,
        rope_base: float,
        marks: Mapping[str, Any],
        last: bool = False,
    ) -> None:
        """Begin to write a checkpoint, or report that it could not be. Collective.

        Args:
            session: has the model and the optimizer, as they are laid over the ranks.
            progress: where the run stands.
            rope_base: base that the last step was trained with.
            marks: what is on record of its place in the run, by which it may be kept.
            last: wait until it is whole, and take its failure for an error: there is nothing else to go on with.

        Raises:
            SaveFailed: the last one could not be written; on all ranks.
            LockLost: another launch has taken over the folder.
        """
        self.settle()
        on_main(self._folder.check_lock)
        wait = last or self._copy is None
        began = time.perf_counter()
        try:
            pending = begin_save(
                self._folder.checkpoints,
                session.model.module,
                session.optimizer,
                progress,
                asdict(self._config),
                rope_base,
                extra={ENTRY: self._inputs.fingerprints(), **session.laid.record(), **marks},
                attach=self._attach,
                copy=self._copy,  # one that is waited for too: pinned memory takes it at a GPU link's speed
                writer=self._writer,
            )
        except SaveFailed as error:
            self._failed(progress.step, error, last)
            return
        self._pending, self._stalled = (progress.step, pending), time.perf_counter() - began
        if wait:
            self.settle(last)

    def settle(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name. Collective.

        Raises:
            SaveFailed: it could not be written, and is the last one; on all ranks.
        """
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        began = time.perf_counter()
        try:
            path = pending.finish()
        except SaveFailed as error:
            self._failed(step, error, last)
            return
        self._stalled += time.perf_counter() - began
        self._unconfirmed, self.newest = True, (step, path)
        if self._has_failed and dist.get_rank() == 0:
            with suppress(OSError):
                remove_leftovers(self._folder.checkpoints)
        self._has_failed = False
        size = f"{pending.bytes / 1e9:.3g} GB" if pending.bytes >= 1e9 else f"{pending.bytes / 1e6:.3g} MB"
        self._report.note(f"saved {path}: {size} in {pending.seconds:.2g} s, the steps waited {self._stalled:.2g} s")

    def begin_reserve(self, session: Session) -> None:
        """Begin to do what :meth:`reserve` waits for, beside the loading of weights; nothing where it has begun."""
        if self._copy is None:
            self._copy = begin_copy(self._config, session)

    def reserve(self, session: Session) -> None:
        """Have host memory for a copy of what a rank saves, if this run saves beside its steps.

        It has to return before a step begins: a step may record graphs, which forbids to pin memory meanwhile.

        Raises:
            Exception: the system maps no more memory.
        """
        self.begin_reserve(session)
        if self._copy is not None:
            self._copy.wait_reserved()

    def release(self) -> None:
        """Give back the memory of copies and forget the plan, before another layout; nothing is being written."""
        if self._copy is not None:
            self._copy.release()
        self._copy, self._writer = None, RankWriter()

    def remove_old(self) -> None:
        """Delete the checkpoints that no option keeps, now that the newest is known to be good."""
        if self._unconfirmed and dist.get_rank() == 0:
            try:
                remove_old(self._folder.checkpoints, self._config.checkpoint)
            except OSError as error:
                self._report.note(f"an old checkpoint could not be deleted: {error}")
        self._unconfirmed = False

    def _failed(self, step: int, error: SaveFailed, last: bool) -> None:
        if last:
            raise error
        self._has_failed = True
        self._report.note(f"step {step}: {error}; the run goes on, the older checkpoints stay")

    def _attach(self, folder: Path) -> None:
        self._inputs.save_tokenizer(folder / TOKENIZER)


def begin_copy(config: PretrainConfig, session: Session) -> StagingBuffer | None:
    """Begin to have host memory for a copy of what a rank saves; its size follows from the shapes of the model alone.

    On a GPU it is pinned, by a thread; on a CPU the first save maps it.

    Returns:
        The memory; None where a run does not save beside its steps.
    """
    if not config.checkpoint.asynchronous or config.checkpoint.interval == 0:
        return None
    copy = StagingBuffer(session.context.device)
    if session.context.device.type == "cuda":
        copy.begin_reserve(most_bytes(session.model.module))
    return copy

"""Saving of a run as it trains: one that fails is told, and costs the run no more than that checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.corpora import ENTRY
from mmtrain.checkpoint.dcp import SaveFailed, save_checkpoint
from mmtrain.checkpoint.listing import remove_old
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import TOKENIZER, RunFolder
from mmtrain.config import PretrainConfig
from mmtrain.train.inputs import RunInputs
from mmtrain.train.report import Report
from mmtrain.train.session import Session


class Saver:
    """Writer of a run's checkpoints, which removes old ones once the newest is known to be good.

    Args:
        folder: the run's folder, which this launch holds.
        config: every option of the run.
        inputs: the run's corpora and tokenizer; a checkpoint keeps a record of the former and the latter itself.
        report: where it is told.

    Attributes:
        newest: step and folder of the newest checkpoint that holds what the run has now, or had when it was saved.
    """

    def __init__(self, folder: RunFolder, config: PretrainConfig, inputs: RunInputs, report: Report) -> None:
        self._folder, self._config, self._inputs, self._report = folder, config, inputs, report
        self.newest: tuple[int, Path] | None = None
        self._unconfirmed = True  # whether no step has used the weights of the newest checkpoint yet

    def save(self, session: Session, progress: Progress, rope_base: float, last: bool) -> None:
        """Write a checkpoint, or report that it could not be written. Collective.

        Args:
            session: has the model and the optimizer, as they are laid over the ranks.
            progress: where the run stands.
            rope_base: base that the last step was trained with.
            last: the run ends with this checkpoint, so there is nothing to go on with.

        Raises:
            SaveFailed: the last one could not be written; on all ranks.
            LockLost: another launch has taken over the folder.
        """
        on_main(self._folder.check_lock)
        try:
            path = save_checkpoint(
                self._folder.checkpoints,
                session.model.module,
                session.optimizer,
                progress,
                asdict(self._config),
                rope_base,
                extra={ENTRY: self._inputs.fingerprints(), "layout": asdict(session.laid.layout)},
                attach=self._attach,
            )
        except SaveFailed as error:
            if last:
                raise
            self._report.note(f"step {progress.step}: {error}; the run goes on, the older checkpoints stay")
            return
        self._unconfirmed, self.newest = True, (progress.step, path)
        self._report.note(f"saved {path}")

    def remove_old(self) -> None:
        """Delete all but the newest checkpoints that are kept, now that the newest is known to be good."""
        if self._unconfirmed and dist.get_rank() == 0:
            try:
                remove_old(self._folder.checkpoints, self._config.checkpoint.keep)
            except OSError as error:
                self._report.note(f"an old checkpoint could not be deleted: {error}")
        self._unconfirmed = False

    def _attach(self, folder: Path) -> None:
        self._inputs.save_tokenizer(folder / TOKENIZER)

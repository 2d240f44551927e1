"""Saving of a run as it trains: one that fails is told, and costs the run no more than that checkpoint."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.dcp import SaveFailed, save_checkpoint
from mmtrain.checkpoint.listing import remove_old
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PretrainConfig
from mmtrain.train.report import Report


def save_or_go_on(
    folder: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: PretrainConfig,
    rope_base: float,
    report: Report,
    last: bool,
) -> None:
    """Write a checkpoint, or report that it could not be written. Collective.

    Args:
        folder: the run's folder, which this launch holds.
        model: the model as it is laid over the ranks.
        optimizer: its optimizer.
        progress: where the run stands.
        config: every option of the run.
        rope_base: base that the last step was trained with.
        report: where it is told.
        last: the run ends with this checkpoint, so there is nothing to go on with.

    Raises:
        SaveFailed: the last one could not be written; on all ranks.
        LockLost: another launch has taken over the folder.
    """
    on_main(folder.check_lock)
    try:
        path = save_checkpoint(folder.checkpoints, model, optimizer, progress, asdict(config), rope_base)
    except SaveFailed as error:
        if last:
            raise
        report.note(f"step {progress.step}: {error}; the run goes on, the older checkpoints stay")
        return
    report.note(f"saved {path}")


def remove_confirmed(folder: RunFolder, keep: int, report: Report) -> None:
    """Delete all but the newest `keep` checkpoints, now that the newest is known to be good. On the main process."""
    if dist.get_rank() == 0:
        try:
            remove_old(folder.checkpoints, keep)
        except OSError as error:
            report.note(f"an old checkpoint could not be deleted: {error}")

"""Going back to an earlier checkpoint when a run's weights are suspect: which one, or why there is none."""

from __future__ import annotations

from pathlib import Path

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.listing import all_checkpoints, step_of
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.verify import damage_of_tensors, has_checksums
from mmtrain.train.curriculum import RunPlan
from mmtrain.train.endings import no_way_back
from mmtrain.train.left_out import LeftOut
from mmtrain.train.position import checkpoint_position
from mmtrain.train.spike_guard import SpikeGuard


def choose_checkpoint(folder: RunFolder, guard: SpikeGuard, plan: RunPlan, at: Progress) -> Path:
    """Return the newest whole checkpoint that lies far enough before the steps that were skipped. Collective.

    Args:
        folder: of the run.
        guard: which has skipped them.
        plan: of the run, which says how often it has gone back.
        at: where the run stands.

    Raises:
        RunStopped: there is none, or the run has gone back too often.
    """
    options = folder.config.guard
    if sum(one.phase == at.phase for one in plan.left_out) >= options.max_rollbacks:
        problem = f"this phase has used up guard.max_rollbacks={options.max_rollbacks}"
        raise no_way_back(at.step, guard.in_row, problem, "guard.max_rollbacks")
    newest = guard.first_skipped - 1 - options.rollback_steps
    for path in reversed(on_main(lambda: all_checkpoints(folder.checkpoints))):
        if step_of(path) <= newest and not _is_damaged(path, folder.config.checkpoint.verify):
            return path
    problem = f"no checkpoint lies {options.rollback_steps} steps before them (guard.rollback_steps)"
    raise no_way_back(at.step, guard.in_row, problem, "checkpoint.keep or checkpoint.interval")


def rows_since(checkpoint: Path, at: Progress) -> LeftOut:
    """Return the rows of the phase at work that the run has read since a checkpoint."""
    before = checkpoint_position(checkpoint)
    return LeftOut(before.step, at.phase, before.row if before.phase == at.phase else 0, at.row)


def _is_damaged(path: Path, verify: bool) -> bool:
    if on_main(lambda: damage_of(path)) is not None:
        return True
    return verify and on_main(lambda: has_checksums(path)) and damage_of_tensors(path) is not None

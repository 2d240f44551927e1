#!/usr/bin/env python
"""Pretrain: `torchrun --nproc-per-node N launch/pretrain.py model=tiny data.path=DIR run.name=NAME`.

Plain `python launch/pretrain.py` runs one process. Options are Hydra's: see configs/ and `--help`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import hydra_entry
from mmtrain.config.process_env import read_processes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def pretrain(config: PretrainConfig) -> None:
    """Check everything, then join the other processes and train."""
    from mmtrain.checkpoint.agreement import on_main
    from mmtrain.checkpoint.progress import read_meta
    from mmtrain.checkpoint.run_folder import RunFolder
    from mmtrain.health.watchdog import Watchdog
    from mmtrain.log.tensorboard_tracker import check_tensorboard
    from mmtrain.log.wandb_tracker import wandb_mode
    from mmtrain.optim.optimizer import check_optimizer
    from mmtrain.output import say
    from mmtrain.parallel import mesh
    from mmtrain.parallel.layout import plan_layout
    from mmtrain.train.curriculum import RunPlan, scaled_phases
    from mmtrain.train.device import keep_freed_memory
    from mmtrain.train.epochs import tokens_by_phase
    from mmtrain.train.inputs import RunInputs
    from mmtrain.train.resume import check_corpora, decide_start, start_position
    from mmtrain.train.stage_warnings import stage_warnings, trained_length
    from mmtrain.train.trainer import Trainer, check_batches

    device = mesh.pick_device(config.cluster)
    check_optimizer(config.optim, device.type)
    check_tensorboard(config.log)
    if read_processes().rank == 0:
        wandb_mode(config.log)  # refuses what cannot be
    phases = scaled_phases(config.stage)
    layout = plan_layout(mesh.world_size(), config.parallel, config.model, [phase.seq_len for phase in phases])
    plan = RunPlan(phases, layout.dp, config.parallel.micro_batch_rows)
    check_batches(config, layout.dp, plan)
    folder = RunFolder(config)
    start = decide_start(config, folder)  # what cannot work is refused by every rank, before any waits for another
    inputs = RunInputs(config.data, phases, config.model.vocab_size, log=_note)
    phase_tokens = tokens_by_phase(plan, config.run.max_steps)
    inputs.check_epochs(phase_tokens)
    notes = inputs.header_lines(phase_tokens)
    notes += check_corpora(start, inputs.fingerprints(), config.data.allow_changed)
    trained = None if start.weights is None else trained_length(read_meta(start.weights))
    notes += (f"warning: {line}" for line in stage_warnings(config, phases, trained))
    inputs.prepare(plan.next(start_position(start)))

    if device.type == "cpu":
        keep_freed_memory()
    context = mesh.start(config.cluster, layout)
    try:
        with Watchdog(config.cluster.timeout_minutes) as watchdog, folder.locked(_note):
            start = on_main(lambda: decide_start(config, folder))  # and now no other launch changes the folder
            start = replace(start, notes=(*notes, *start.notes))
            for line in Trainer(config, context, plan, inputs, folder, start).run(watchdog):
                say(line)
    finally:
        mesh.stop()


def _note(line: str) -> None:
    """Print a line on stderr, on the main process."""
    if read_processes().rank == 0:
        print(f"note: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Train with the options of the command line; exit codes: see :func:`~mmtrain.config.cli.hydra_entry`."""
    hydra_entry(pretrain, CONFIGS)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Pretrain: `torchrun --nproc-per-node N launch/pretrain.py model=tiny data.path=DIR run.name=NAME`.

Plain `python launch/pretrain.py` runs one process. Options are Hydra's: see configs/ and `--help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import hydra_entry
from mmtrain.config.process_env import read_processes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def pretrain(config: PretrainConfig) -> None:
    """Check everything, then join the other processes and train."""
    from mmtrain.checkpoint.dcp import check_same_model, find_checkpoint, read_meta
    from mmtrain.checkpoint.run_folder import RunFolder
    from mmtrain.health.watchdog import Watchdog
    from mmtrain.log.wandb_tracker import wandb_mode
    from mmtrain.optim.optimizer import check_optimizer
    from mmtrain.parallel import mesh
    from mmtrain.parallel.layout import plan_layout
    from mmtrain.train.curriculum import RunPlan, scaled_phases
    from mmtrain.train.device import keep_freed_memory
    from mmtrain.train.inputs import RunInputs
    from mmtrain.train.stage_warnings import stage_warnings, trained_length
    from mmtrain.train.trainer import Trainer, check_batches

    device = mesh.pick_device(config.cluster)
    check_optimizer(config.optim, device.type)
    phases = scaled_phases(config.stage)
    layout = plan_layout(mesh.world_size(), config.parallel, config.model, [phase.seq_len for phase in phases])
    plan = RunPlan(phases, layout.dp, config.parallel.micro_batch_rows)
    check_batches(config, layout.dp, plan)
    folder, trained = RunFolder(config), None
    if (resumed := folder.resume_from()) is not None:
        check_same_model("run.resume", resumed, config.model)
    elif config.run.init_from is not None:
        source = find_checkpoint("run.init_from", config.run.init_from)
        check_same_model("run.init_from", source, config.model)
        trained = trained_length(read_meta(source))
    inputs = RunInputs(config.data, phases, config.model.vocab_size)
    if read_processes().rank == 0:
        wandb_mode(config.log)  # refuses what cannot be
        for line in stage_warnings(config, phases, trained):
            print(f"warning: {line}", file=sys.stderr, flush=True)

    if device.type == "cpu":
        keep_freed_memory()
    context = mesh.start(config.cluster, layout)
    try:
        with Watchdog(config.cluster.timeout_minutes) as watchdog:
            for line in Trainer(config, context, plan, inputs, folder).run(watchdog):
                print(line, flush=True)
    finally:
        mesh.stop()


def main() -> None:
    """Train with the options of the command line; exits with code 2 for bad input, 3 for a run that lost a rank."""
    hydra_entry(pretrain, CONFIGS)


if __name__ == "__main__":
    main()

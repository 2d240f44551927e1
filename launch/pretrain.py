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
    from mmtrain.checkpoint.run_folder import RunFolder
    from mmtrain.evals.needles import needle_evaluation
    from mmtrain.health.watchdog import Watchdog
    from mmtrain.log.tensorboard_tracker import check_tensorboard
    from mmtrain.log.wandb_tracker import wandb_mode
    from mmtrain.optim.optimizer import check_optimizer
    from mmtrain.output import say
    from mmtrain.parallel import mesh
    from mmtrain.train.device import keep_freed_memory
    from mmtrain.train.epochs import tokens_by_phase
    from mmtrain.train.inputs import RunInputs
    from mmtrain.train.plan_run import plan_run
    from mmtrain.train.plan_table import plan_lines
    from mmtrain.train.resume import (
        check_corpora,
        decide_start,
        recorded_cp,
        start_position,
        verified_start,
        weights_record,
    )
    from mmtrain.train.stage_warnings import stage_warnings, trained_length
    from mmtrain.train.trainer import Trainer

    device = mesh.pick_device(config.cluster)
    if not config.run.plan:
        check_optimizer(config.optim, device.type)
    check_tensorboard(config.log)
    if read_processes().rank == 0 and not config.run.plan:
        wandb_mode(config.log)  # refuses what cannot be
    world = config.run.plan_processes if config.run.plan and config.run.plan_processes else mesh.world_size()
    planned = plan_run(config, world, device, recorded_cp(config))
    if config.run.plan:
        if read_processes().rank == 0:
            say("\n".join(plan_lines(planned)))
        return
    config, phases, plan, memory = planned.config, planned.phases, planned.plan, planned.memory
    memory.check()
    folder = RunFolder(config)
    start = decide_start(config, folder)  # what cannot work is refused by every rank, before any waits for another
    inputs = RunInputs(config.data, phases, config.model.vocab_size, log=_note)
    source = config.data.all_sources[0].path
    units = [laid.row_unit for laid in planned.layouts]
    needles = needle_evaluation(config, phases, units, inputs.held_out, inputs.tokenizer, source)
    phase_tokens = tokens_by_phase(plan, config.run.max_steps)
    inputs.check_epochs(phase_tokens)
    notes = [*planned.choices, *inputs.header_lines(phase_tokens)]
    notes += needles.header_lines(phases) if needles else []
    notes += check_corpora(start, inputs.fingerprints(), config.data.allow_changed)
    record = weights_record(start)
    warned = stage_warnings(config, phases, trained_length(record), record.get("rope_base"))
    notes += (f"warning: {line}" for line in warned)
    first = plan.next(start_position(start))
    inputs.prepare(first)

    if device.type == "cpu":
        keep_freed_memory()
    processes = mesh.join(config.cluster)
    planned.check_same_on_all(processes)
    context = processes.lay_out(planned.layouts[-1 if first is None else first.phase_index].layout)
    try:
        with Watchdog(config.cluster.timeout_minutes) as watchdog, folder.locked(_note):
            looked_at, start = start, verified_start(config, folder)  # now that no other launch changes the folder
            if (start.resume, start.weights) != (looked_at.resume, looked_at.weights):  # an older one, for damage
                notes += check_corpora(start, inputs.fingerprints(), config.data.allow_changed)
            start = replace(start, notes=(*notes, *start.notes))
            with memory.told():
                trainer = Trainer(config, context, plan, inputs, folder, start, needles, memory)
                for line in trainer.run(watchdog):
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

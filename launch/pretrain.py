#!/usr/bin/env python
"""Pretrain: `torchrun --nproc-per-node N launch/pretrain.py model=tiny data.path=DIR run.name=NAME`.

Plain `python launch/pretrain.py` runs one process. Options are Hydra's: see configs/ and `--help`.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import hydra_entry, note
from mmtrain.config.process_env import read_processes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def pretrain(config: PretrainConfig) -> None:
    """Check everything, then join the other processes and train."""
    from mmtrain.health.watchdog import Watchdog
    from mmtrain.output import say
    from mmtrain.parallel import mesh
    from mmtrain.train.plan_table import plan_lines
    from mmtrain.train.prepared_run import plan_launch, prepare_run
    from mmtrain.train.trainer import Trainer

    planned = plan_launch(config)
    if config.run.plan:
        if read_processes().rank == 0:
            say("\n".join(plan_lines(planned)))
        return
    run = prepare_run(planned, note)
    context = run.join()
    try:
        with Watchdog(config.cluster.timeout_minutes, run.folder.path / "stacks") as watchdog, run.folder.locked(note):
            start = run.verified_start()  # now that no other launch changes the folder
            with planned.memory.told():
                trainer = Trainer(planned.config, context, planned.plan, run.inputs, run.folder, start, run.needles,
                                  planned.memory, run.reference(start))  # fmt: skip
                for line in trainer.run(watchdog):
                    say(line)
    finally:
        mesh.stop()


def main() -> None:
    """Train with the options of the command line; exit codes: see :func:`~mmtrain.config.cli.hydra_entry`."""
    faulthandler.enable()  # a crash within a library says where, on every rank
    hydra_entry(pretrain, CONFIGS)


if __name__ == "__main__":
    main()

"""The whole plan of a run, from its options and the number of processes: arithmetic alone, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.mesh import World
from mmtrain.train.cp_choice import choose_cp
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.layout_choice import fit_layouts
from mmtrain.train.phase_batches import plan_batches
from mmtrain.train.phase_frozen import check_phases_frozen, frozen_lines, frozen_parts
from mmtrain.train.phase_layouts import PhaseLayout, plan_phase_layouts
from mmtrain.train.phase_memory import PhaseMemory
from mmtrain.train.phase_stages import balance_phases
from mmtrain.train.sharding_choice import choose_sharding


@dataclass(frozen=True)
class PlannedRun:
    """A run as it will be trained.

    Attributes:
        config: every option, with numbers for those that were left to the plan.
        phases: with their scales applied.
        plan: their batches, layouts and predicted memory.
        memory: of all phases.
        choices: a line on each number that was chosen.
    """

    config: PretrainConfig
    phases: list[PhaseConfig]
    plan: RunPlan
    memory: PhaseMemory
    choices: list[str]

    @property
    def layouts(self) -> list[PhaseLayout]:
        """The layout of each phase."""
        return [phase.laid for phase in self.plan.phases if phase.laid is not None]

    def check_same_on_all(self, world: World) -> None:
        """Refuse ranks that plan differently, as they may where their devices have different memory. Before groups.

        Raises:
            ConfigError: this rank's plan is not the main process's.
        """
        mine = "; ".join(
            f"{one.layout} {[len(stage) for stage in one.stages]}{'' if one.parallel.reshards else ' whole weights'}"
            for one in self.layouts
        )
        main = world.of_main("plan", mine)
        if main != mine:
            raise ConfigError("parallel.cp", self.config.parallel.cp,
                              f"this rank plans {mine}, the main process {main}: their devices' memory differs, or one "
                              "does not see the newest checkpoint",
                              "give cluster.device_memory_gib, the least of all devices; start again")  # fmt: skip


def plan_run(config: PretrainConfig, world: int, device: torch.device, kept: Sequence[int | None] = ()) -> PlannedRun:
    """Choose what the options leave open, lay out every phase, and predict its memory, which is not checked here.

    Args:
        config: every option.
        world: number of processes.
        device: of this process.
        kept: context parallelism of each phase in the checkpoint at which the run goes on (`choose_cp`).

    Raises:
        ConfigError: the first option that cannot work.
    """
    check_phases_frozen(config)
    config, fitted = fit_layouts(config, world, device)
    config, choices = choose_cp(config, world, device, kept)
    config, whole = choose_sharding(config, world, device)
    phases = scaled_phases(config.stage)
    layouts = plan_phase_layouts(world, config.parallel, config.model, phases)
    pairs = zip(layouts, phases, strict=True)
    layouts = [replace(laid, frozen=frozen_parts(config.optim, one)) for laid, one in pairs]
    plan = plan_batches(config, phases, layouts)
    balance_phases(config, plan, device)
    lines = fitted + choices + whole + frozen_lines(config, phases)
    return PlannedRun(config, phases, plan, PhaseMemory.of(config, plan, device), lines)

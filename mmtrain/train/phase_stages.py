"""The stages of the pipelines of a run's phases, balanced before anything starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmtrain.config import PretrainConfig
from mmtrain.parallel.memory.stages import balance_stages
from mmtrain.train.curriculum import PhasePlan, RunPlan
from mmtrain.train.phase_memory import device_memory, phase_workload


def balance_phases(config: PretrainConfig, plan: RunPlan, device: torch.device) -> None:
    """Give the layout of every phase with a pipeline its stages.

    Phases of one layout are trained on the same stages, as they do not stop in between: these cost about the same at
    the length of the phase of most tokens, and fit the device in each of the phases.
    """
    for phase in plan.phases:
        if phase.laid is None or phase.laid.layout.pp == 1 or phase.laid.stages:
            continue
        alike = [one for one in plan.phases if one.laid == phase.laid]
        give_stages(config, alike, device)


def give_stages(config: PretrainConfig, phases: list[PhasePlan], device: torch.device, search: bool = True) -> None:
    """Balance the stages of phases of one layout (`balance_stages`)."""
    works = [phase_workload(config, phase, device) for phase in phases]
    longest = max((phase.phase for phase in phases), key=lambda phase: phase.tokens)  # where most of the work is
    stages = balance_stages(works, longest.seq_len, device_memory(config, device), search)
    for phase in phases:
        assert phase.laid is not None
        phase.laid = replace(phase.laid, stages=stages)

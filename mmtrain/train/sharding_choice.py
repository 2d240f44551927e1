"""Sharding of phases that leave it open (`parallel.reshard_after_forward=auto`): whole weights where they pay and fit.

Data parallelism alone on short rows waits for the host, which FSDP2's hooks keep busy. With whole weights on every rank
it runs from CUDA graphs: on two H200s, of 32,768 tokens a GPU and step, a 70M model is 3.5 times as fast as without
graphs, `hybrid_410m` 1.38 times, `hybrid_1b` 1.03 times (`mmtrain/bench/results/2026-11-29-step-2h200`; FSDP2 itself
was not beside them). Larger models have kernels enough to hide the host and FSDP2's messages behind, and with few
tokens a step the exchange, which nothing hides, costs more.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.config.parallel import AUTO
from mmtrain.model.flops import count_parameters
from mmtrain.parallel.memory.options import may_not_fit
from mmtrain.parallel.memory.predict import GIB, margin_bytes
from mmtrain.parallel.memory.workload import Workload
from mmtrain.train.cp_choice import planned_with, predicted
from mmtrain.train.curriculum import PhasePlan, scaled_phases
from mmtrain.train.phase_layouts import asked, with_layout
from mmtrain.train.phase_memory import device_memory, phase_workload

LARGEST, LEAST_TOKENS = 2e9, 2**15
"""Parameters, and tokens of a rank's step: as far as was measured."""


def choose_sharding(config: PretrainConfig, world: int, device: torch.device) -> tuple[PretrainConfig, list[str]]:
    """Let phases keep whole weights that leave it open, would run from graphs, gain by it, and fit with their margin.

    The others shard as ``true`` does. Where no memory is known, as on CPUs, nothing is chosen.

    Args:
        config: every option, with numbers for `cp`.
        world: number of processes.
        device: of this process.

    Returns:
        The options, and a line for each phase that keeps whole weights.
    """
    device_bytes = device_memory(config, device)
    if world == 1 or device_bytes is None:
        return config, []
    phases, lines = list(config.stage.phases), []
    for i, phase in enumerate(scaled_phases(config.stage)):
        if asked(config.parallel, phase, "reshard_after_forward") != AUTO:
            continue
        plan = _whole(config, phase, i, world)
        if plan is None or not _gains(phase_workload(config, plan, device)):
            continue
        found = predicted(config, plan, device)
        if may_not_fit(found, device_bytes, world):
            continue
        phases[i] = with_layout(phases[i], reshard_after_forward=False)
        needs = f"{found.gib:.1f} GiB and {margin_bytes(found.peak, world) / GIB:.1f} of margin predicted"
        lines.append(
            f"whole   {phase.name}: every rank keeps all weights, gathered once a step: {needs}, of "
            f"{device_bytes / GIB:.1f}"
        )
    return replace(config, stage=replace(config.stage, phases=phases)), lines


def _whole(config: PretrainConfig, phase: PhaseConfig, index: int, world: int) -> PhasePlan | None:
    """The phase planned with whole weights; None where it cannot run, which is told when the run is planned."""
    wanted = with_layout(phase, reshard_after_forward=False)
    plan = planned_with(config, wanted, index, world, asked(config.parallel, phase, "cp"))
    return plan if isinstance(plan, PhasePlan) else None


def _gains(work: Workload) -> bool:
    few = count_parameters(work.model).total <= LARGEST
    return few and work.micro_batches * work.row_tokens >= LEAST_TOKENS and work.records_graphs

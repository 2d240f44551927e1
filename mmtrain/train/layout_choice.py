"""Layout of a run whose number of processes has changed (`parallel.fit`): the nearest to the one that was asked for.

Ranks that are lost or come back change how many replicas there are, and where they leave a model without one, how it
is cut. Every phase keeps its tensor, expert-tensor and context parallelism where it can, then its pipeline, then its
expert parallelism; data and expert-data parallelism take what is left, as always. The batch is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from mmtrain.config import ParallelConfig, PhaseConfig, PretrainConfig
from mmtrain.config.parallel import AUTO
from mmtrain.errors import ConfigError
from mmtrain.parallel.memory.options import cannot_fit
from mmtrain.train.cp_choice import planned_with, predicted
from mmtrain.train.curriculum import PhasePlan, scaled_phases
from mmtrain.train.phase_layouts import with_layout
from mmtrain.train.phase_memory import device_memory

AXES = ("tp", "etp", "cp", "pp", "ep")
"""What may become smaller, the one that is kept longest first."""


def fit_layouts(config: PretrainConfig, world: int, device: torch.device) -> tuple[PretrainConfig, list[str]]:
    """Give each phase that does not run on so many processes smaller axes with which it does, and say so in a line.

    A phase for which there are none stays as it is: its plan says why it cannot run.

    Args:
        config: every option; nothing changes unless `parallel.fit` is set.
        world: number of processes.
        device: of this process.
    """
    if not config.parallel.fit:
        return config, []
    phases, lines = list(config.stage.phases), []
    for i, phase in enumerate(scaled_phases(config.stage)):
        wanted = config.parallel if phase.parallel is None else phase.parallel.over(config.parallel)
        found = next(_fitting(config, phase, i, wanted, world, device), None)
        moved = {} if found is None else {axis: size for axis, size in found.items() if size != getattr(wanted, axis)}
        if moved:
            phases[i] = with_layout(phases[i], **moved)
            told = ", ".join(f"{axis} {getattr(wanted, axis)} -> {size}" for axis, size in moved.items())
            lines.append(f"fit     {phase.name}: {told}, for {world} processes")
    return replace(config, stage=replace(config.stage, phases=phases)), lines


def _fitting(
    config: PretrainConfig, phase: PhaseConfig, index: int, wanted: ParallelConfig, world: int, device: torch.device
) -> Iterator[dict[str, int | str]]:
    """Axes with which a phase runs, nearest first; those that its device cannot hold come last."""
    device_bytes, too_large = device_memory(config, device), []
    for sizes in product(*(_sizes(getattr(wanted, axis)) for axis in AXES)):
        axes = dict(zip(AXES, sizes, strict=True))
        plan = _runs(config, with_layout(phase, **axes), index, world)
        if plan is None:
            continue
        if device_bytes is None or not cannot_fit(predicted(config, plan, device), device_bytes):
            yield axes
        else:
            too_large.append(axes)
    yield from too_large


def _sizes(size: int | str) -> list[int | str]:
    """What an axis may become: itself, or one of its divisors, large ones first; ``auto`` stays."""
    if isinstance(size, str):
        return [size]
    found: list[int | str] = [one for one in range(size, 0, -1) if size % one == 0]
    return found


def _runs(config: PretrainConfig, phase: PhaseConfig, index: int, world: int) -> PhasePlan | None:
    """Return the plan of a phase, with the least cp that runs where it is open; None if none does."""
    assert phase.parallel is not None
    parallel = phase.parallel.over(config.parallel)
    try:
        parallel.validate()
    except ConfigError:
        return None
    numbers = [cp for cp in range(1, world + 1) if world % cp == 0] if parallel.cp == AUTO else [parallel.cp_size]
    plans = (planned_with(config, phase, index, world, cp) for cp in numbers)
    return next((plan for plan in plans if isinstance(plan, PhasePlan)), None)

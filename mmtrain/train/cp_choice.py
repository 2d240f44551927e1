"""Context parallelism of phases that leave it open (`parallel.cp=auto`): the least with which they run and fit.

More ranks a row cost messages in every layer, and save activations alone; so a phase gets no more of them than its rows
and the device's memory ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.config.parallel import AUTO
from mmtrain.errors import ConfigError
from mmtrain.parallel.memory.options import cannot_fit, may_not_fit
from mmtrain.parallel.memory.predict import GIB, MemoryPrediction, margin_bytes, predict
from mmtrain.train.curriculum import PhasePlan, scaled_phases
from mmtrain.train.phase_batches import check_phase_batches
from mmtrain.train.phase_layouts import asked, lay_out_phase, with_layout
from mmtrain.train.phase_memory import device_memory, phase_workload
from mmtrain.train.phase_stages import give_stages


def choose_cp(
    config: PretrainConfig, world: int, device: torch.device, kept: Sequence[int | None] = ()
) -> tuple[PretrainConfig, list[str]]:
    """Put a number in the place of every `cp` that is ``auto``, and say in a line why, where it is not 1.

    A phase gets 1 if it runs and fits the device with its margin; else the least larger number with which it does; else
    the least with which it may fit; else the least that runs, which is refused later with what else would help. So is
    what cannot run at all. Where no memory is known, whatever runs is taken to fit.

    Args:
        config: every option.
        world: number of processes.
        device: of this process.
        kept: of each phase, the number that the checkpoint at which this launch goes on was trained with; None where
            there is none. It is taken where the phase runs with it on these processes.
    """
    phases = scaled_phases(config.stage)
    chosen: dict[int, int] = {}
    lines = []
    for i, phase in enumerate(phases):
        if asked(config.parallel, phase, "cp") != AUTO:
            continue
        before = kept[i] if i < len(kept) else None
        if before is not None and _still_runs(config, phase, i, world, device, before):
            chosen[i], why = before, "as in the checkpoint"
        else:
            chosen[i], why = _least(config, phase, i, world, device)
        if chosen[i] > 1:
            lines.append(f"cp      {phase.name}: cp={chosen[i]}, {why}")
    return _with_numbers(config, chosen), lines


@dataclass(frozen=True)
class _Tried:
    """A number of ranks with which a phase runs, and its memory with it."""

    cp: int
    found: MemoryPrediction
    world: int

    def __str__(self) -> str:
        return f"{self.found.gib:.1f} GiB and {margin_bytes(self.found.peak, self.world) / GIB:.1f} of margin"


def _least(config: PretrainConfig, phase: PhaseConfig, index: int, world: int, device: torch.device) -> tuple[int, str]:
    """The number for one phase, and why it is not 1."""
    device_bytes, tried, refused = device_memory(config, device), [], ""
    for cp, plan in _candidates(config, phase, index, world):
        if isinstance(plan, ConfigError):
            refused = refused or plan.problem
            continue
        runs = f"the least that runs: with cp=1 {refused}" if cp > 1 and not tried else ""
        if device_bytes is None:
            return cp, runs
        one = _Tried(cp, predicted(config, plan, device), world)
        tried.append(one)
        if not may_not_fit(one.found, device_bytes, world):
            if len(tried) == 1:
                return cp, runs
            less, fits = tried[-2], f"the least that fits {device_bytes / GIB:.1f} GiB"
            return cp, f"{fits}: {one} predicted; cp={less.cp} needs {less}"
    if not tried:
        return 1, ""
    one = next((one for one in tried if not cannot_fit(one.found, device_bytes)), tried[0])
    return one.cp, f"the least that may fit {device_bytes / GIB:.1f} GiB: {one} predicted"


def _still_runs(
    config: PretrainConfig, phase: PhaseConfig, index: int, world: int, device: torch.device, cp: int
) -> bool:
    """Whether a phase runs with the number that a checkpoint's run had, perhaps on other processes."""
    plan = next((plan for one, plan in _candidates(config, phase, index, world) if one == cp), None)
    if plan is None or isinstance(plan, ConfigError):
        return False
    device_bytes = device_memory(config, device)
    return device_bytes is None or not cannot_fit(predicted(config, plan, device), device_bytes)


def predicted(config: PretrainConfig, plan: PhasePlan, device: torch.device) -> MemoryPrediction:
    """Return the memory that a phase which was laid out needs, with the stages of its pipeline balanced."""
    if plan.laid is not None and plan.laid.layout.pp > 1:
        give_stages(config, [plan], device)
    return predict(phase_workload(config, plan, device))


def planned_with(
    config: PretrainConfig, phase: PhaseConfig, index: int, world: int, cp: int
) -> PhasePlan | ConfigError:
    """Return a phase planned with a number of ranks that share a row, or why it cannot be."""
    wanted = with_layout(phase, cp=cp)
    try:
        laid = lay_out_phase(world, config.parallel, config.model, wanted)
        rows = laid.parallel.micro_batch_rows
        plan = PhasePlan(wanted, laid.layout.dp, rows, f"stage.phases[{index}]", laid)
        check_phase_batches(config, plan, index)
    except ConfigError as error:
        return error
    return plan


def _candidates(
    config: PretrainConfig, phase: PhaseConfig, index: int, world: int
) -> Iterator[tuple[int, PhasePlan | ConfigError]]:
    """Every number of ranks that could share a row, from 1 on: the phase planned with it, or why it cannot be."""
    for cp in (cp for cp in range(1, world + 1) if world % cp == 0):
        yield cp, planned_with(config, phase, index, world, cp)


def _with_numbers(config: PretrainConfig, chosen: dict[int, int]) -> PretrainConfig:
    """The same options with numbers: the run's is that of the first phase that follows it, others have their own."""
    phases = list(config.stage.phases)
    run = config.parallel.cp
    if run == AUTO:
        follow = (i for i in chosen if phases[i].parallel is None or phases[i].parallel.cp is None)
        run = next((chosen[i] for i in follow), 1)
    for i, cp in chosen.items():
        own = phases[i].parallel
        if cp != run or (own is not None and own.cp == AUTO):
            phases[i] = with_layout(phases[i], cp=cp)
    return replace(config, parallel=replace(config.parallel, cp=run), stage=replace(config.stage, phases=phases))

"""Batches of phases against their layouts: what is refused before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError
from mmtrain.parallel.pipeline.schedule import check_schedule
from mmtrain.train.curriculum import PhasePlan, RunPlan, scaled_phases
from mmtrain.train.phase_layouts import PhaseLayout, of_each_phase


def plan_batches(config: PretrainConfig, phases: Sequence[PhaseConfig], layouts: Sequence[PhaseLayout]) -> RunPlan:
    """Plan the batches of all phases.

    Args:
        config: every option.
        phases: with their scales applied.
        layouts: of each phase.

    Raises:
        ConfigError: batches that their layouts cannot run: the first, in its problem those of the other phases, and in
            its fix the scales nearest to the stage's with which all of them run.
    """
    try:
        return _planned(config, phases, layouts)
    except ConfigError as error:
        scales = [scale for scale in _near_scales(config, phases, layouts) if _runs(config, scale, layouts)]
        if not scales:
            raise
        words = " or ".join(f"stage.batch_scale={scale}" for scale in scales)
        raise ConfigError(
            error.option, error.value, error.problem, f"{error.fix}; all phases run with {words}"
        ) from None


def _planned(config: PretrainConfig, phases: Sequence[PhaseConfig], layouts: Sequence[PhaseLayout]) -> RunPlan:
    plan = RunPlan.laid_out(phases, layouts)
    of_each_phase(phases, lambda i, _: check_phase_batches(config, plan.phases[i], i))
    return plan


def _near_scales(
    config: PretrainConfig, phases: Sequence[PhaseConfig], layouts: Sequence[PhaseLayout]
) -> Iterator[Fraction]:
    """The batch scales next to the stage's with which all processes may get as many rows in every phase."""
    unit = math.lcm(*(laid.layout.dp * laid.parallel.micro_batch_rows for laid in layouts))
    common = math.gcd(*(rows for phase in phases for rows in PhasePlan(phase, 1, 1).used_rows()))
    now = Fraction(config.stage.batch_scale).limit_denominator(10**6)
    for units in (common // unit, common // unit + 1):
        if units:
            yield now * Fraction(units * unit, common)


def _runs(config: PretrainConfig, scale: Fraction, layouts: Sequence[PhaseLayout]) -> bool:
    try:
        _planned(config, scaled_phases(replace(config.stage, batch_scale=float(scale))), layouts)
    except ConfigError:
        return False
    return True


def check_phase_batches(config: PretrainConfig, phase: PhasePlan, index: int) -> None:
    """Refuse batches of one phase that its layout cannot run.

    Raises:
        ConfigError: the first of them.
    """
    assert phase.laid is not None
    parallel, dp, seq_len = phase.laid.parallel, phase.laid.layout.dp, phase.phase.seq_len
    unit = phase.laid.row_unit
    name = "tp" if parallel.cp == 1 else "cp"
    alone = config.data.valid_rows > 0 or config.stage.preference is not None  # the reference's rows are run so too
    require(not alone or seq_len % unit == 0, f"parallel.{name}", getattr(parallel, name),
            f"validation runs one row at a time: {seq_len} tokens / {unit} that share it is not whole",
            f"give another parallel.{name}, or data.valid_rows=0")  # fmt: skip
    for num_rows in phase.used_rows():
        micro_batches = num_rows // (dp * parallel.micro_batch_rows)
        check_schedule(parallel, f"stage.phases[{index}].batch", num_rows * seq_len, micro_batches)

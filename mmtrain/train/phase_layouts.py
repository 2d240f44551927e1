"""The layout that each phase of a run is trained under, decided for all phases before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from mmtrain.checkpoint.progress import FROZEN
from mmtrain.config import ModelConfig, ParallelConfig, PhaseConfig
from mmtrain.config.parallel import PhaseParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import Layout, plan_layout

Planned = TypeVar("Planned")


@dataclass(frozen=True)
class PhaseLayout:
    """Options of the layout of a phase, the sizes of all axes that follow, and what is trained under it.

    A phase that freezes other parts than the one before has another layout of optimizer and gradients, if not of
    weights: the run goes over to it in the same way.

    Attributes:
        parallel: the run's options under the phase's own, with a number for `cp`.
        layout: sizes of all axes.
        stages: layers of each stage of the pipeline, once they are balanced (`mmtrain.train.phase_stages`).
        frozen: patterns of the parameters that are not trained (`mmtrain.model.frozen`).
    """

    parallel: ParallelConfig
    layout: Layout
    stages: tuple[range, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def row_unit(self) -> int:
        """What the tokens of a row that is run by itself must be a multiple of."""
        cp, tp = self.layout.cp, self.layout.tp
        return math.lcm(cp * tp, cp * self.parallel.cp_chunks if cp > 1 else 1)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint records of it, by entry."""
        return {"layout": asdict(self.layout), FROZEN: list(self.frozen)}


def plan_phase_layouts(
    world: int, run: ParallelConfig, model: ModelConfig, phases: Sequence[PhaseConfig]
) -> list[PhaseLayout]:
    """Lay out every phase over `world` processes.

    Args:
        world: number of processes.
        run: options of the run; ``cp=auto`` is 1 here: `mmtrain.train.cp_choice` puts numbers in its place.
        model: a validated model.
        phases: with their scales applied.

    Raises:
        ConfigError: the first option that cannot work, and in its problem those of the other phases.
    """
    return of_each_phase(phases, lambda _, phase: lay_out_phase(world, run, model, phase))


def of_each_phase(phases: Sequence[PhaseConfig], plan: Callable[[int, PhaseConfig], Planned]) -> list[Planned]:
    """Return what `plan` makes of each phase and its index; phases that it refuses are told all at once.

    Raises:
        ConfigError: the first one's error, which names the phase's own option where it has one, and in its problem
            those of the others.
    """
    made: list[Planned] = []
    refused: list[ConfigError] = []
    for i, phase in enumerate(phases):
        try:
            made.append(plan(i, phase))
        except ConfigError as error:
            refused.append(_of_phase(error, phase, i))
    if not refused:
        return made
    first, (_, *others) = refused[0], dict.fromkeys(f"{one.option}={one.value}: {one.problem}" for one in refused)
    more = "".join(f"; and {one}" for one in others)
    raise ConfigError(first.option, first.value, f"{first.problem}{more}", first.fix)


def lay_out_phase(world: int, run: ParallelConfig, model: ModelConfig, phase: PhaseConfig) -> PhaseLayout:
    """Lay out one phase: :func:`plan_phase_layouts`. Its errors name the run's options.

    Raises:
        ConfigError: an option that cannot work.
    """
    parallel = run if phase.parallel is None else phase.parallel.over(run)
    parallel = replace(parallel, cp=parallel.cp_size)
    return PhaseLayout(parallel, plan_layout(world, parallel, model, [phase.seq_len]))


def asked(run: ParallelConfig, phase: PhaseConfig, option: str) -> Any:
    """Return the value of an option of the layout that a phase is given: its own, else the run's."""
    own = None if phase.parallel is None else getattr(phase.parallel, option)
    return getattr(run, option) if own is None else own


def with_layout(phase: PhaseConfig, **options: Any) -> PhaseConfig:
    """Return a phase with options of the layout of its own."""
    return replace(phase, parallel=replace(phase.parallel or PhaseParallelConfig(), **options))


def changes(before: ParallelConfig, now: ParallelConfig) -> str:
    """Return the options that differ between two layouts: "cp 1 -> 2, tp 2 -> 1"."""
    pairs = ((one.name, getattr(before, one.name), getattr(now, one.name)) for one in fields(ParallelConfig))
    return ", ".join(f"{name} {_word(old)} -> {_word(new)}" for name, old, new in pairs if old != new)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_phase(error: ConfigError, phase: PhaseConfig, index: int) -> ConfigError:
    """The same error, naming the phase's own option where the value is the phase's."""
    group, _, name = error.option.partition(".")
    if group != "parallel" or phase.parallel is None or getattr(phase.parallel, name, None) is None:
        return error
    option = f"stage.phases[{index}].parallel"
    return ConfigError(f"{option}.{name}", error.value, error.problem, error.fix.replace("parallel.", f"{option}."))

"""Parts of the model that each phase of a run leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.build import meta_model
from mmtrain.config import OptimConfig, PhaseConfig, PretrainConfig
from mmtrain.log.console import count_text
from mmtrain.model.frozen import check_frozen, count_trained


def frozen_parts(optim: OptimConfig, phase: PhaseConfig) -> tuple[str, ...]:
    """Return the patterns of what a phase freezes: its own, else the run's."""
    return tuple(optim.frozen if phase.frozen is None else phase.frozen)


def check_phases_frozen(config: PretrainConfig) -> None:
    """Refuse patterns that name nothing in the model, or leave a phase nothing to train.

    Raises:
        ConfigError: the first of them.
    """
    given = {"optim.frozen": config.optim.frozen}
    given |= {f"stage.phases[{i}].frozen": phase.frozen or [] for i, phase in enumerate(config.stage.phases)}
    for option, patterns in given.items():
        if patterns:
            check_frozen(option, patterns, meta_model(config.model))


def frozen_lines(config: PretrainConfig, phases: Sequence[PhaseConfig]) -> list[str]:
    """Return a line for the header on each phase that freezes something."""
    lines = []
    for phase in phases:
        if patterns := frozen_parts(config.optim, phase):
            trained, total = count_trained(meta_model(config.model), patterns)
            lines.append(f"frozen  {phase.name}: {', '.join(patterns)}: {count_text(trained)} of {count_text(total)} "
                         "parameters are trained")  # fmt: skip
    return lines


def frozen_change(before: Sequence[str], now: Sequence[str]) -> str:
    """Return what differs between the patterns of two phases: "frozen [embed_tokens] -> []"; empty for the same."""
    return "" if before == now else f"frozen [{', '.join(before)}] -> [{', '.join(now)}]"

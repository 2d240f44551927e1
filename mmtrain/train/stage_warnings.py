"""Warnings on a stage that can be trained, but hardly as it was meant: schedules, batches, lengths that do not meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import PhasePlan
from mmtrain.train.lr_schedule import lr_at
from mmtrain.train.position import recorded_phases, recorded_position
from mmtrain.train.warmup_floor import MIN_WARMUP_STEPS, is_warmup, step_ends, warmup_steps


def stage_warnings(
    config: PretrainConfig,
    phases: Sequence[PhaseConfig],
    trained: int | None = None,
    trained_base: float | None = None,
) -> list[str]:
    """Return a line for each fault of a run's stage.

    Args:
        config: of the run.
        phases: its phases with their scales applied.
        trained: longest rows that the weights which the run starts from were trained with; None if unknown.
        trained_base: RoPE base that they were trained with; None if unknown.
    """
    found = list(_best_warnings(config))
    base, whose = trained_base or 0.0, "the weights it starts from were trained with"
    longest, before = trained or 0, "the weights it starts from were trained with"
    for i, phase in enumerate(phases):
        option = f"stage.phases[{i}]"
        if phase.seq_len < longest:
            found.append(f"{option}.seq_len={phase.seq_len}: shorter than the {longest} tokens that {before}; raise "
                         f"stage.scale={config.stage.scale:g} or the length, if the context is to grow")  # fmt: skip
        if phase.rope_base < base:
            found.append(f"{option}.rope_base={phase.rope_base:g}: lower than the {base:g} that {whose}, though longer "
                         "rows want a higher one; give that or more")  # fmt: skip
        if phase.rope_base > base:
            base, whose = phase.rope_base, f"{option} is trained with"
        if phase.seq_len > longest:
            longest, before = phase.seq_len, f"{option} is trained with"
        found += [*_batch_warnings(option, phase), *_warmup_warnings(option, phase), *_lr_warnings(option, phase)]
    return found


def trained_length(record: Mapping[str, Any]) -> int | None:
    """Return the longest rows that a checkpoint was trained with, by its record; None if the record does not say.

    Args:
        record: of a checkpoint: ``step`` and ``tokens`` done, and ``config`` with its stage.
    """
    try:
        phases, position = recorded_phases(record), recorded_position(record)
    except (ConfigError, KeyError, TypeError):
        return None
    return max((phase.seq_len for phase in phases[: position.phase + 1]), default=None) if position.tokens else None


def _best_warnings(config: PretrainConfig) -> Iterator[str]:
    """Tell where `checkpoint.keep_best` finds no held-out loss of most checkpoints; an early stop saves them itself."""
    options, every = config.checkpoint, config.log.valid_interval
    preference = config.stage.preference
    if not (options.keep_best and options.keep and options.interval):
        return
    if preference is not None and preference.patience is not None:
        return
    wanted = f"give log.valid_interval={options.interval}"
    if not every or not config.data.valid_rows:
        option = "log.valid_interval=0" if not every else "data.valid_rows=0"
        more = "" if config.data.valid_rows else " and data.valid_rows above 0"
        yield (f"checkpoint.keep_best={options.keep_best}: no held-out loss is measured before the end ({option}), so "
               f"that none is known to be the best; {wanted}{more}")  # fmt: skip
    elif options.interval % every:
        both = math.lcm(options.interval, every)
        yield (f"checkpoint.keep_best={options.keep_best}: a checkpoint comes every {options.interval} steps and a "
               f"held-out loss every {every} (log.valid_interval), both only every {both}; {wanted}")  # fmt: skip


def _batch_warnings(option: str, phase: PhaseConfig) -> Iterator[str]:
    first = phase.batch[0].tokens
    if first > phase.tokens:
        yield (f"{option}.batch[0].tokens={first}: the phase is one step, as it has only {phase.tokens} tokens; lower "
               "stage.batch_scale or raise stage.token_scale")  # fmt: skip
    for j, point in enumerate(phase.batch[1:], start=1):
        if point.at >= phase.tokens:
            yield f"{option}.batch[{j}].at={point.at}: never reached, as the phase ends at {phase.tokens} tokens"


def _warmup_warnings(option: str, phase: PhaseConfig) -> Iterator[str]:
    if not is_warmup(phase.lr):
        return
    steps, first = warmup_steps(phase), next(step_ends(phase))
    if steps < MIN_WARMUP_STEPS:
        yield (f"{option}.lr[0].tokens={phase.lr[0].tokens}: a warm-up of {steps} step{'s'[: steps - 1]}, the "
               f"first of {first} tokens at lr {lr_at(phase.lr, first):.2g}; lengthen it, lower stage.batch_scale or "
               "raise stage.token_scale")  # fmt: skip


def _lr_warnings(option: str, phase: PhaseConfig) -> Iterator[str]:
    """Compare where a schedule ends with where its phase does, to the step."""
    end, step = sum(segment.tokens for segment in phase.lr), _last_step(phase)
    last = phase.lr[-1].end
    if end + step <= phase.tokens:
        yield (f"{option}.lr: its segments end at {end} of {phase.tokens} tokens; the last value {last:g} holds on "
               "from there")  # fmt: skip
    if end >= phase.tokens + step and (reached := lr_at(phase.lr, phase.tokens)) != last:
        yield (f"{option}.lr: its segments go on to {end} tokens and the phase ends at {phase.tokens}; the rate ends "
               f"at {reached:.3g}, not at {last:g}")  # fmt: skip


def _last_step(phase: PhaseConfig) -> int:
    """Return the tokens of the phase's last step."""
    return PhasePlan(phase, dp_size=1, micro_batch_rows=1).num_rows(phase.tokens - 1) * phase.seq_len

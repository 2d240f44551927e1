"""What a run that is resumed may change: its options beside those that its checkpoint was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.recorded_options import NOTHING, Difference, differences, flat_options, recorded_values
from mmtrain.config import DataConfig, OptimConfig, ParallelConfig, PhaseConfig, PretrainConfig, StageConfig
from mmtrain.config.option_marks import FREE_ON_RESUME, LAYOUT, is_marked
from mmtrain.config.schema import build
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import scaled_phases
from mmtrain.train.phase_frozen import frozen_parts
from mmtrain.train.position import checkpoint_position

FROM_HERE_ON = ("tokens", "batch", "lr")  # of the phase at work: what says how long it lasts and how it goes on
_SCALES = ("stage.scale", "stage.token_scale", "stage.batch_scale")
_NAMED = 3  # differences that a note lists


def compare_with_checkpoint(config: PretrainConfig, checkpoint: Path) -> str | None:
    """Refuse options that would change what a checkpoint was trained with; return a line on a schedule that changes.

    Options outside the stage must be the checkpoint's, but for those marked as free and those of the layout. Of the
    stage its phases count, as they are once scaled: with `run.change_schedule` the phase at work may get another
    length, batch ramp and learning rate from here on, and later phases may become anything; what is trained already
    stays.

    Raises:
        ConfigError: naming an option, with its value before and now, and in its problem all others of phases that are
            trained already.
    """
    recorded = recorded_values(read_meta(checkpoint)["config"])
    different = [one for one in differences(recorded, config) if not is_marked(PretrainConfig, one.option, LAYOUT)]
    inside_of = ("stage.phases", *_SCALES, "stage.name", "optim.frozen")
    outside = next((one for one in different if not one.option.startswith(inside_of)), None)
    if outside is not None:
        raise _refusal(outside, checkpoint, _back_or_anew(outside))
    before, now = _stage(recorded), config.stage
    optim = build(OptimConfig, recorded.get("optim", {}), "optim")
    old = _effective(scaled_phases(before), _data(recorded), optim)
    new = _effective(scaled_phases(now), config.data, config.optim)
    if old == new:
        return None
    inside = [one for one in different if not one.option.endswith(("stage.name", "].name"))]
    progress = checkpoint_position(checkpoint)
    phase, consumed = progress.phase, progress.phase_tokens
    if fixed := list(_trained_already(old, new, phase, consumed)):
        typed: dict[str, Difference] = {}
        for one in fixed:
            named = _as_typed(one, inside)
            typed.setdefault(named.option, named)
        first, *others = typed.values()
        raise _refusal(first, checkpoint, _back_or_anew(first) + _reason(fixed[0], consumed), others)
    if not config.run.change_schedule:
        one = inside[0]
        raise _refusal(one, checkpoint, f"{_back(one)}, or run.change_schedule=true to change the schedule from step "
                                        f"{progress.step} on")  # fmt: skip
    listed = ", ".join(f"{one.option} {one.before} -> {one.now}" for one in inside[:_NAMED])
    more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
    return f"schedule changed from step {progress.step} on: {listed}{more}"


def _trained_already(
    old: list[dict[str, object]], new: list[dict[str, object]], phase: int, consumed: int
) -> Iterator[Difference]:
    """Yield the scaled values that differ and may not: of earlier phases, and of what the present one is."""
    for index in range(min(phase + 1, len(old))):
        before, now = old[index], new[index] if index < len(new) else {}
        for name in dict.fromkeys([*before, *now]):
            one = Difference(f"stage.phases[{index}].{name}", before.get(name, NOTHING), now.get(name, NOTHING))
            later = index == phase and now and name.partition("[")[0].partition(".")[0] in FROM_HERE_ON
            if name == "tokens" and (now.get("transition") or now.get("long_share")):
                later = False  # where its shares change follows from its length
            cut_off = later and name == "tokens" and one.now < consumed
            if one.before != one.now and (not later or cut_off):
                yield one


def _as_typed(scaled: Difference, typed: Sequence[Difference]) -> Difference:
    """Return the option that a user changed, where a scaled value differs: itself, or the scale that it comes from."""
    if ".frozen" in scaled.option:  # of the phase or of the run, whichever was typed
        return scaled
    at_place = next((one for one in typed if one.option == scaled.option), None)
    within = next((one for one in typed if one.option.startswith(scaled.option.rpartition(".")[0])), None)
    scale = next((one for one in typed if one.option in _SCALES), None)
    return at_place or scale or within or scaled


def _refusal(one: Difference, checkpoint: Path, fix: str, others: Sequence[Difference] = ()) -> ConfigError:
    more = "".join(f"; and {other.option}={other.now}: with {other.before}" for other in others[:_NAMED])
    more += f"; and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return ConfigError(one.option, one.now, f"{checkpoint} was trained with {one.before}{more}", fix)


def _back(one: Difference) -> str:
    return "leave it out" if one.before == NOTHING else "give that value"


def _back_or_anew(one: Difference) -> str:
    return f"{_back(one)}, or start another run from its weights with run.init_from"


def _reason(fixed: Difference, consumed: int) -> str:
    if fixed.option.endswith("].tokens"):
        return f" (of the phase {consumed} tokens are trained already)"
    return " (that part is trained already: run.change_schedule changes what comes after it)"


def _effective(phases: Sequence[PhaseConfig], data: DataConfig, optim: OptimConfig) -> list[dict[str, object]]:
    """Return what each phase comes to, by place: scaled, with what it reads and freezes, without its name."""
    made = []
    for phase in phases:
        # A corpus may lie elsewhere now: `check_corpora` knows it by its content.
        given = phase.sources or data.all_sources
        sources = [{"weight": source.weight, "buckets": source.buckets} for source in given]
        values = dataclasses.asdict(phase) | {"sources": sources, "frozen": list(frozen_parts(optim, phase))}
        del values["name"]
        own = values["parallel"] or {}
        values["parallel"] = {name: own[name] for name in own if own[name] is not None and _is_bound(name)}
        made.append(flat_options(values, ""))
    return made


def _is_bound(name: str) -> bool:
    """Whether an option of the layout changes more than where numbers are computed, and how they are rounded."""
    return not any(is_marked(ParallelConfig, name, mark) for mark in (FREE_ON_RESUME, LAYOUT))


def _stage(recorded: dict) -> StageConfig:
    return build(StageConfig, recorded.get("stage", {}), "stage")


def _data(recorded: dict) -> DataConfig:
    return build(DataConfig, recorded.get("data", {}), "data")

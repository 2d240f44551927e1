"""What a launch starts from, and whether its options fit what the checkpoint was trained with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.corpora import check_same_corpora, check_same_tokenizer
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.dcp import check_same_model
from mmtrain.checkpoint.listing import find_checkpoint
from mmtrain.checkpoint.progress import Progress, read_meta
from mmtrain.checkpoint.recorded_options import NOTHING, Difference, differences, flat_options, recorded_values
from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.checkpoint.verify import damage_of_tensors, has_checksums, size_of
from mmtrain.config import DataConfig, PhaseConfig, PretrainConfig, StageConfig
from mmtrain.config.schema import build
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import scaled_phases
from mmtrain.train.position import checkpoint_position

FROM_HERE_ON = ("tokens", "batch", "lr")  # of the phase at work: what says how long it lasts and how it goes on
_SCALES = ("stage.scale", "stage.token_scale", "stage.batch_scale")
_NAMED = 3  # differences that a note lists


def verified_start(config: PretrainConfig, folder: RunFolder) -> Start:
    """Choose the checkpoint that a launch begins with, and read all its bytes against its checksums. Collective.

    One whose tensors are damaged is passed over as one that lacks a file is, and the next is chosen and read. With
    `checkpoint.verify=false` tensors are not read before they are loaded.

    Raises:
        ConfigError: as :func:`decide_start` raises it; on all ranks.
    """
    known: dict[Path, str] = {}
    while True:
        start = on_main(lambda: decide_start(config, folder, lambda path: known.get(path) or damage_of(path)))
        chosen = start.resume or start.weights
        if chosen is None:
            return start
        if not on_main(partial(has_checksums, chosen)):
            return _noted(start, f"warning: {chosen} is of before checksums: damage within its tensors is not seen")
        if not config.checkpoint.verify:
            return start
        began = time.perf_counter()
        damage = damage_of_tensors(chosen)
        if damage is None:
            took = time.perf_counter() - began
            size = on_main(partial(size_of, chosen))
            return _noted(start, f"verified {chosen}: {size / 1e9:.3g} GB in {took:.1f} s")
        known[chosen] = damage


def _noted(start: Start, line: str) -> Start:
    return dataclasses.replace(start, notes=(*start.notes, line))


def decide_start(config: PretrainConfig, folder: RunFolder, check: Callable[[Path], str | None] = damage_of) -> Start:
    """Choose the checkpoint that a launch begins with, and compare its configuration with this launch's.

    Nothing is written, so every rank may call it, and the main process again once the folder is locked.

    Args:
        config: every option of the launch.
        folder: of the run.
        check: returns what is damaged of a checkpoint, None for a whole one.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or something that was trained already would change.
    """
    notes: list[str] = []
    checkpoint = folder.resume_from(notes.append, check)
    if checkpoint is None:
        weights = config.run.init_from
        if weights is None:
            return Start(notes=tuple(notes))
        found = find_checkpoint("run.init_from", weights, notes.append, check)
        check_same_model("run.init_from", found, config.model)
        return Start(weights=found, notes=tuple(notes))
    check_same_model("run.resume", checkpoint, config.model)
    if changed := compare_with_checkpoint(config, checkpoint):
        notes.append(changed)
    return Start(resume=checkpoint, notes=tuple(notes))


def start_position(start: Start) -> Progress:
    """Return where a launch begins."""
    return Progress() if start.resume is None else checkpoint_position(start.resume)


def check_corpora(start: Start, fingerprints: Mapping[str, Any], allow_changed: bool) -> list[str]:
    """Refuse corpora and tokenizer that are not those of what a launch begins with; return lines on what moved.

    Args:
        start: of this launch.
        fingerprints: `RunInputs.fingerprints`.
        allow_changed: go on all the same, with a line that says so.

    Raises:
        ConfigError: naming the corpus or the tokenizers, and the option that overrides.
    """
    if start.resume is not None:
        return check_same_corpora(start.resume, read_meta(start.resume), fingerprints, allow_changed)
    if start.weights is not None:
        meta = read_meta(start.weights)
        return check_same_tokenizer("run.init_from", start.weights, meta, fingerprints, allow_changed)
    return []


def compare_with_checkpoint(config: PretrainConfig, checkpoint: Path) -> str | None:
    """Refuse options that would change what a checkpoint was trained with; return a line on a schedule that changes.

    Options outside the stage must be the checkpoint's, but for those marked as free. Of the stage its phases count, as
    they are once scaled: with `run.change_schedule` the phase at work may get another length, batch ramp and learning
    rate from here on, and later phases may become anything; what is trained already stays.

    Raises:
        ConfigError: naming one option, with its value before and now.
    """
    recorded = recorded_values(read_meta(checkpoint)["config"])
    different = differences(recorded, config)
    outside = next((one for one in different if not one.option.startswith("stage.")), None)
    if outside is not None:
        raise _refusal(outside, checkpoint, _back_or_anew(outside))
    before, now = _stage(recorded), config.stage
    old, new = _effective(scaled_phases(before), _data(recorded)), _effective(scaled_phases(now), config.data)
    if old == new:
        return None
    inside = [one for one in different if not one.option.endswith(("stage.name", "].name"))]
    progress = checkpoint_position(checkpoint)
    phase, consumed = progress.phase, progress.phase_tokens
    if (fixed := _trained_already(old, new, phase, consumed)) is not None:
        named = _as_typed(fixed, inside)
        raise _refusal(named, checkpoint, _back_or_anew(named) + _reason(fixed, consumed))
    if not config.run.change_schedule:
        one = inside[0]
        raise _refusal(one, checkpoint, f"{_back(one)}, or run.change_schedule=true to change the schedule from step "
                                        f"{progress.step} on")  # fmt: skip
    listed = ", ".join(f"{one.option} {one.before} -> {one.now}" for one in inside[:_NAMED])
    more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
    return f"schedule changed from step {progress.step} on: {listed}{more}"


def _trained_already(
    old: list[dict[str, object]], new: list[dict[str, object]], phase: int, consumed: int
) -> Difference | None:
    """Return the first scaled value that differs and may not: of an earlier phase, or of what the present one is."""
    for index in range(min(phase + 1, len(old))):
        before, now = old[index], new[index] if index < len(new) else {}
        for name in dict.fromkeys([*before, *now]):
            one = Difference(f"stage.phases[{index}].{name}", before.get(name, NOTHING), now.get(name, NOTHING))
            later = index == phase and now and name.partition("[")[0].partition(".")[0] in FROM_HERE_ON
            if name == "tokens" and (now.get("transition") or now.get("long_share")):
                later = False  # where its shares change follows from its length
            cut_off = later and name == "tokens" and one.now < consumed
            if one.before != one.now and (not later or cut_off):
                return one
    return None


def _as_typed(scaled: Difference, typed: Sequence[Difference]) -> Difference:
    """Return the option that a user changed, where a scaled value differs: itself, or the scale that it comes from."""
    at_place = next((one for one in typed if one.option == scaled.option), None)
    within = next((one for one in typed if one.option.startswith(scaled.option.rpartition(".")[0])), None)
    scale = next((one for one in typed if one.option in _SCALES), None)
    return at_place or scale or within or scaled


def _refusal(one: Difference, checkpoint: Path, fix: str) -> ConfigError:
    return ConfigError(one.option, one.now, f"{checkpoint} was trained with {one.before}", fix)


def _back(one: Difference) -> str:
    return "leave it out" if one.before == NOTHING else "give that value"


def _back_or_anew(one: Difference) -> str:
    return f"{_back(one)}, or start another run from its weights with run.init_from"


def _reason(fixed: Difference, consumed: int) -> str:
    if fixed.option.endswith("].tokens"):
        return f" (of the phase {consumed} tokens are trained already)"
    return " (that part is trained already: run.change_schedule changes what comes after it)"


def _effective(phases: Sequence[PhaseConfig], data: DataConfig) -> list[dict[str, object]]:
    """Return what each phase comes to, by place: scaled, with the sources it reads, without its name."""
    made = []
    for phase in phases:
        # A corpus may lie elsewhere now: `check_corpora` knows it by its content.
        given = phase.sources or data.all_sources
        sources = [{"weight": source.weight, "buckets": source.buckets} for source in given]
        values = dataclasses.asdict(phase) | {"sources": sources}
        del values["name"]
        made.append(flat_options(values, ""))
    return made


def _stage(recorded: dict) -> StageConfig:
    return build(StageConfig, recorded.get("stage", {}), "stage")


def _data(recorded: dict) -> DataConfig:
    return build(DataConfig, recorded.get("data", {}), "data")

"""What a launch starts from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmdata.tokenizer_identity import BYTES, identity_of_path
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.corpora import ENTRY, check_same_corpora, check_same_tokenizer
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.init_parts import EYES_OPTION, check_eyes, check_parts, check_same_eyes, eyes_lines
from mmtrain.checkpoint.listing import find_checkpoint
from mmtrain.checkpoint.load import check_same_model, is_text_alone
from mmtrain.checkpoint.progress import Progress, read_meta
from mmtrain.checkpoint.recorded_options import recorded_values
from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.checkpoint.verify import damage_of_tensors, has_checksums, size_of
from mmtrain.config import ParallelConfig, PretrainConfig, StageConfig
from mmtrain.config.schema import build
from mmtrain.errors import ConfigError
from mmtrain.hf.eyes_folder import open_eyes
from mmtrain.hf.folder import check_folder, is_hf_folder, open_folder, tokenizer_is_bytes
from mmtrain.hf.hf_config import RELEASED_EPS
from mmtrain.log.console import count_text
from mmtrain.model.frozen import is_frozen
from mmtrain.parallel.layout import Layout
from mmtrain.train.curriculum import scaled_phases
from mmtrain.train.position import checkpoint_position
from mmtrain.train.resumed_options import compare_with_checkpoint
from mmtrain.vision.flops import count_vision_parameters


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
        lines: list[str] = []
        for chosen in (start.resume or start.weights, start.eyes):
            if chosen is None or is_hf_folder(chosen):  # a folder's index, sizes and shapes were checked
                continue
            damage, line = _read_all(chosen, config.checkpoint.verify)
            lines += line
            if damage is not None:
                known[chosen] = damage
                break
        else:
            return dataclasses.replace(start, notes=(*start.notes, *lines))


def _read_all(checkpoint: Path, verify: bool) -> tuple[str | None, list[str]]:
    """Return what is damaged of a checkpoint's tensors, None for nothing, and lines on how it was found. Collective."""
    if not on_main(partial(has_checksums, checkpoint)):
        return None, [f"warning: {checkpoint} is of before checksums: damage within its tensors is not seen"]
    if not verify:
        return None, []
    began = time.perf_counter()
    damage = damage_of_tensors(checkpoint)
    if damage is not None:
        return damage, []
    took = time.perf_counter() - began
    size = on_main(partial(size_of, checkpoint))
    return None, [f"verified {checkpoint}: {size / 1e9:.3g} GB in {took:.1f} s"]


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
        return _with_eyes(config, _start_anew(config, notes, check), check)
    check_same_model("run.resume", checkpoint, config.model)
    if changed := compare_with_checkpoint(config, checkpoint):
        notes.append(changed)
    return Start(resume=checkpoint, notes=tuple(notes))


def _start_anew(config: PretrainConfig, notes: list[str], check: Callable[[Path], str | None]) -> Start:
    """Choose the weights of a run from its first step (`run.init_from`).

    Raises:
        ConfigError: they are damaged, or of another model.
    """
    weights = config.run.init_from
    if weights is None:
        return Start(notes=tuple(notes))
    if is_hf_folder(weights):
        return _start_from_folder(config, Path(weights))
    found, parts = find_checkpoint("run.init_from", weights, notes.append, check), config.run.init_parts
    if parts:
        notes += check_parts(found, config.model, parts)
    else:
        check_same_model("run.init_from", found, config.model)
        notes += check_same_eyes("run.init_from", found, config.model)
        if config.model.vision is not None and config.run.init_eyes is None and is_text_alone(found):
            size = count_text(sum(count_vision_parameters(config.model).values()))
            notes.append(f"run.init_from={found}: a model of text; the eyes, {size} parameters, begin anew by "
                         f"run.seed={config.run.seed}")  # fmt: skip
    return Start(weights=found, parts=tuple(parts), notes=tuple(notes))


def _with_eyes(config: PretrainConfig, start: Start, check: Callable[[Path], str | None]) -> Start:
    """Add the eyes that a run from its first step takes from elsewhere (`run.init_eyes`), if any.

    Raises:
        ConfigError: there are none, they are damaged or others than the model's, or the model has none.
    """
    path, model = config.run.init_eyes, config.model
    if path is None:
        return start
    if model.vision is None:
        raise ConfigError(EYES_OPTION, path, f"model={model.name} has no eyes", "leave it out, or give a model with "
                          "eyes, for example model=vl_3b")  # fmt: skip
    if not is_hf_folder(path):
        notes: list[str] = []
        found = find_checkpoint(EYES_OPTION, path, notes.append, check)
        notes += check_eyes(found, model)
    else:
        found, folder = Path(path), open_eyes(EYES_OPTION, path, model)
        notes = eyes_lines(found, len(folder.taken), folder.anew)
        if folder.tile != model.vision.tile_size:
            notes.append(f"model.vision.tile_size={model.vision.tile_size}: position embeddings of tiles of "
                         f"{folder.tile} are interpolated")  # fmt: skip
    return dataclasses.replace(start, eyes=found, notes=(*start.notes, *notes))


def recorded_cp(config: PretrainConfig) -> list[int | None]:
    """Return the context parallelism of each phase that the run which this launch goes on with was planned with.

    None for a phase that the run did not have, or not with this length; for all of a run from its first step none.

    Raises:
        ConfigError: `run.resume` names no checkpoint that can be gone on from.
    """
    if config.run.resume == "never":
        return []
    checkpoint = RunFolder(config).resume_from(lambda line: None)
    if checkpoint is None:
        return []
    recorded = recorded_values(read_meta(checkpoint)["config"])
    run = build(ParallelConfig, recorded["parallel"], "parallel")
    found: list[int | None] = []
    for before, now in zip(
        scaled_phases(build(StageConfig, recorded.get("stage", {}), "stage")), scaled_phases(config.stage), strict=False
    ):
        cp = (run if before.parallel is None else before.parallel.over(run)).cp_size
        found.append(cp if before.seq_len == now.seq_len else None)
    return found


def layout_lines(start: Start, layout: Layout, global_router: bool) -> list[str]:
    """Return a line on a layout that is not the one which the checkpoint of a launch was written under.

    Args:
        start: of this launch.
        layout: that it goes on with.
        global_router: whether ranks pool their experts' capacity (`parallel.global_router`).
    """
    before = None if start.resume is None else read_meta(start.resume).get("layout")
    if not isinstance(before, dict):  # of a version that did not record it, or nothing to go on from
        return []
    pairs = ((axis, before.get(axis, size), size) for axis, size in dataclasses.asdict(layout).items())
    moved = [f"{axis} {then} -> {now}" for axis, then, now in pairs if then != now]
    if not moved:
        return []
    lines = [f"layout  {', '.join(moved)} since {start.resume}: the run goes on the same but for rounding"]
    if global_router:
        lines.append("warning: parallel.global_router=true: other ranks pool their capacity now, which drops others")
    return lines


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
    if start.weights is not None and _takes_text(start):
        meta = weights_record(start)
        lines = check_same_tokenizer("run.init_from", start.weights, meta, fingerprints, allow_changed)
        if ENTRY not in meta and is_hf_folder(start.weights):
            lines.append(f"run.init_from={start.weights}: it has no tokenizer.json, so its tokenizer is not compared")
        return lines
    return []


def weights_record(start: Start) -> dict[str, Any]:
    """Return what is on record of the weights that a run from its first step takes; nothing where it takes no text.

    Of a Hugging Face folder that is its tokenizer, if it has one, and the RoPE base of its weights.

    Raises:
        ConfigError: the folder is damaged.
    """
    if start.weights is None or not _takes_text(start):
        return {}
    if not is_hf_folder(start.weights):
        return read_meta(start.weights)
    folder = open_folder("run.init_from", start.weights)
    record: dict[str, Any] = {"rope_base": folder.model.rope_base}
    if tokenizer_is_bytes(folder) or (start.weights / "tokenizer.json").is_file():
        found = identity_of_path(BYTES if tokenizer_is_bytes(folder) else start.weights)
        record[ENTRY] = {"tokenizer": found.as_dict()}
    return record


def _takes_text(start: Start) -> bool:
    """Whether the weights that a run from its first step takes are a text model's, which knows a tokenizer."""
    return not start.parts or is_frozen("embed_tokens.weight", start.parts)


def _start_from_folder(config: PretrainConfig, path: Path) -> Start:
    """Check a Hugging Face folder as a whole, before anything is started, and start from its weights.

    Raises:
        ConfigError: it is damaged or holds another model; or the first phase has a lower RoPE base than its weights
            were trained with, which spoils them.
    """
    if config.run.init_parts:
        raise ConfigError("run.init_parts", config.run.init_parts, f"run.init_from={path} is a Hugging Face folder, "
                          "which is taken as a whole", "leave run.init_parts out, or give run.init_eyes")  # fmt: skip
    folder = check_folder("run.init_from", path, config.model)
    notes = [
        f"run.init_from={path}: {len(folder.places):,} tensors of a Hugging Face folder; AdamW's moments begin at 0"
    ]
    if folder.model.vision is None and config.model.vision is not None and config.run.init_eyes is None:
        notes.append("the folder is of text alone: the eyes begin from run.seed")
    first, base = config.stage.phases[0].rope_base, folder.model.rope_base
    if first < base:
        raise ConfigError("stage.phases[0].rope_base", f"{first:g}", f"the weights of run.init_from={path} were "
                          f"trained with {base:g}", "give that, or a higher one to extend the context")  # fmt: skip
    if first > base:
        notes.append(f"stage.phases[0].rope_base={first:g}: the weights were trained with {base:g}")
    if config.model.lightning_norm_eps != RELEASED_EPS:
        notes.append(f"model.lightning_norm_eps={config.model.lightning_norm_eps:g}: the folder does not say its own, "
                     f"which is {RELEASED_EPS:g} in the released code")  # fmt: skip
    return Start(weights=path, notes=tuple(notes))

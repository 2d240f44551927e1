"""Loading of any run's checkpoint as a whole model on one device, or as each rank's part of one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmtrain.build import meta_model
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.listing import find_checkpoint
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.rope_base import rope_base_of
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.checkpoint.verify import damage_of_tensors, has_checksums
from mmtrain.config import ModelConfig
from mmtrain.config.schema import build
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import HFFolder, is_hf_folder, open_folder
from mmtrain.hf.read_weights import load_folder
from mmtrain.infer.compute_dtype import INT8, cast_for_compute, compute_dtype
from mmtrain.infer.device import choose_device
from mmtrain.infer.joined_projections import join_projections
from mmtrain.infer.memory import check_room
from mmtrain.infer.quantised.reader import check_finite, weight_reader
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.infer.quantised.stream import stream_model
from mmtrain.infer.request import check_rope_base
from mmtrain.infer.run_tokenizer import tokenizer_of_run
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.model.model import HybridLM
from mmtrain.parallel.serving.lay_out import keep_own_parts, lay_out_for_inference


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of which all is known but its weights.

    Attributes:
        path: its folder.
        model: its model, with the RoPE base to decode with.
        tokenizer: the one it was trained with.
        folder: where it is no checkpoint of a run but a Hugging Face folder, that.
    """

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    folder: HFFolder | None = None


def load_for_decoding(
    path: Path, tokenizer: str | None = None, device: str | None = None, rope_base: float | None = None
) -> tuple[HybridLM, Tokenizer]:
    """Read the newest checkpoint at or below `path` and the tokenizer it was trained with.

    Args:
        path: a run folder, or one of its checkpoints.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; None takes the run's.
        device: where the model goes, as :func:`~mmtrain.infer.device.choose_device` takes it.
        rope_base: RoPE base to decode with; None takes the one that the checkpoint was saved with.

    Returns:
        The model as :func:`load_weights` returns it, and the tokenizer.

    Raises:
        ConfigError: as :func:`open_checkpoint`, :func:`load_weights` and `choose_device` raise it.
        DataError: the tokenizer that was given is missing or broken.
    """
    chosen = choose_device(device)
    opened = open_checkpoint(path, tokenizer, rope_base)
    return load_weights(opened, chosen), opened.tokenizer


def open_checkpoint(
    path: Path, tokenizer: str | None = None, rope_base: float | None = None, verify: bool = True
) -> OpenedCheckpoint:
    """Find the newest whole checkpoint at or below `path`, and take all from it but its weights.

    Args:
        path: a run folder, its folder of checkpoints, or one of these; or a Hugging Face folder.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; None takes the run's.
        rope_base: RoPE base to decode with; None takes the one that the checkpoint was saved with.
        verify: read all its bytes against its checksums; else those of small files alone.

    Raises:
        ConfigError: there is no complete checkpoint, or it is damaged; its tokenizer is not found, or not the one that
            is given; its RoPE base is neither known nor given, or cannot be one.
        DataError: the tokenizer that was given is missing or broken.
    """
    if is_hf_folder(path):
        return _open_folder(path, tokenizer, rope_base)
    if path.resolve().name == "checkpoints":
        path = path.resolve().parent
    checkpoint = find_checkpoint("checkpoint", path, _note, _damage if verify else damage_of)
    if not has_checksums(checkpoint):
        _note(f"{checkpoint} is of before checksums: damage within its tensors is not seen")
    meta = read_meta(checkpoint)
    if rope_base is None:
        rope_base = rope_base_of(checkpoint, meta)
    check_rope_base(rope_base)
    model = replace(build(ModelConfig, meta["config"]["model"], "model"), rope_base=rope_base)
    made = tokenizer_of_run(checkpoint, meta, tokenizer, model.vocab_size)
    return OpenedCheckpoint(checkpoint, model, made)


def _open_folder(path: Path, tokenizer: str | None, rope_base: float | None) -> OpenedCheckpoint:
    folder = open_folder("checkpoint", path)
    model = folder.model if rope_base is None else replace(folder.model, rope_base=rope_base)
    check_rope_base(model.rope_base)
    if tokenizer is None and not (path / "tokenizer.json").is_file():
        raise ConfigError("checkpoint", path, "has no tokenizer.json", "give --tokenizer")
    made = load_tokenizer(path / "tokenizer.json" if tokenizer is None else tokenizer)
    if made.vocab_size > model.vocab_size:
        raise ConfigError("checkpoint", path, f"the tokenizer has {made.vocab_size:,} tokens, the model only "
                          f"{model.vocab_size:,}", "give --tokenizer with the one it was trained with")  # fmt: skip
    return OpenedCheckpoint(path, model, made, folder)


def load_weights(
    opened: OpenedCheckpoint, device: torch.device, precision: str = "fp32", ranks: Ranks = ALONE
) -> HybridLM:
    """Read the weights of a checkpoint, of whatever layout; of several ranks each reads its own part. Collective.

    Args:
        opened: the checkpoint.
        device: where the model goes.
        precision: "fp32", "bf16", "int8" or "int8-g128"; all but fp32 are read one parameter at a time
            (`mmtrain.infer.quantised.stream`), so that the fp32 model is never there as a whole. Of several ranks each
            reads its part in fp32 and turns it into these then.
        ranks: that share the weights.

    Returns:
        The model in evaluation mode, whose parameters are plain tensors; in fp32 it has the master weights.

    Raises:
        ConfigError: the device has no room for them, the checkpoint is damaged, or a weight is not a finite number; on
            all ranks alike.
    """
    if precision != "fp32" and ranks.size == 1:
        return stream_model(opened.model, weight_reader(opened.path, opened.folder), precision, device)
    model = meta_model(opened.model)
    if ranks.context is not None:
        lay_out_for_inference(model, ranks.context)
    ranks.check_alike(lambda: check_room(model, device, ranks.size))
    model = model.to_empty(device=device)
    if opened.folder is not None:
        load_folder("checkpoint", opened.folder, model)
    else:
        state = {"model": model.state_dict()}
        metadata = metadata_of("checkpoint", opened.path)
        load_shards("checkpoint", opened.path, metadata, state, alone=ranks.size == 1)
        model.load_state_dict(state["model"])
    keep_own_parts(model)
    ranks.check_alike(lambda: _check_finite(model, opened.path))
    if precision in INT8:
        quantise_model(model, INT8[precision])
    cast_for_compute(model, compute_dtype(precision, device))
    join_projections(model)
    return model.eval()


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _damage(checkpoint: Path) -> str | None:
    return damage_of(checkpoint) or damage_of_tensors(checkpoint)


def _check_finite(model: HybridLM, path: Path) -> None:
    for name, value in model.state_dict().items():
        check_finite(name, value, path)

"""Parts of a model that a run takes from a checkpoint of another: the eyes of a small model for a large one, above all.

Parts are named as those of `optim.frozen` are (`mmtrain.model.frozen`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from mmtrain.build import meta_model
from mmtrain.checkpoint.positions import POSITIONS, is_square, stored_shape
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.safe_load import metadata_of
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.config.option_marks import SHAPES_WEIGHTS, marked_fields
from mmtrain.errors import ConfigError
from mmtrain.model.frozen import check_named, is_frozen

OPTION = "run.init_parts"
EYES_OPTION, EYES = "run.init_eyes", ("encoder",)
_OF_TEXT_WIDTH = ("encoder.projector.", "encoder.newline_D")
_BESIDE_SHAPES = ("num_heads", "activation", "norm_eps")


class TakenParts(NamedTuple):
    """Parameters and buffers that patterns name.

    Attributes:
        names: those that are read from a checkpoint.
        anew: those of the way from the eyes to the text model, which begin anew as the text models' widths differ.
    """

    names: frozenset[str]
    anew: tuple[str, ...]


def taken_parts(checkpoint: Path, model: nn.Module, parts: Sequence[str], option: str = "run.init_from") -> TakenParts:
    """Return what a model takes from a checkpoint by patterns.

    Args:
        checkpoint: that they are taken from.
        model: that takes them; it may be a meta one.
        parts: patterns.
        option: that named the checkpoint.

    Raises:
        ConfigError: a part is in one of both alone, or has shapes that do not fit.
    """
    metadata = metadata_of(option, checkpoint)
    here = {name: tuple(one.shape) for kind in (model.named_parameters(), model.named_buffers()) for name, one in kind}
    here = {name: shape for name, shape in here.items() if is_frozen(name, parts)}
    stored = (key.removeprefix("model.") for key in metadata.state_dict_metadata if key.startswith("model."))
    if extra := next((name for name in stored if is_frozen(name, parts) and name not in here), None):
        raise ConfigError(OPTION, list(parts), f"{checkpoint} has {extra}, which this model has not",
                          "give the model as many layers there, or name other parts")  # fmt: skip
    anew = []
    for name, shape in here.items():
        before = stored_shape(metadata, name)
        if before == shape or (name == POSITIONS and before is not None and is_square(before, shape)):
            continue
        if not name.startswith(_OF_TEXT_WIDTH):
            problem = f"{name} is {list(shape)} here and {'nothing' if before is None else list(before)} there"
            raise ConfigError(OPTION, list(parts), f"{problem} ({checkpoint})", "give its shape, or name other parts")
        anew.append(name)
    return TakenParts(frozenset(here) - frozenset(anew), tuple(anew))


def check_parts(checkpoint: Path, model: ModelConfig, parts: Sequence[str]) -> list[str]:
    """Refuse parts that cannot be taken, before anything is started, and return lines on those that are.

    Raises:
        ConfigError: patterns that name nothing, or as :func:`taken_parts` and :func:`check_same_eyes` raise it.
    """
    whole = meta_model(model)
    check_named(OPTION, parts, whole)
    if any(name.startswith("encoder.vision_tower.") and is_frozen(name, parts) for name, _ in whole.named_parameters()):
        lines = check_same_eyes("run.init_from", checkpoint, model, heads=is_frozen("contrastive.image_EF", parts))
    else:
        lines = []
    taken = taken_parts(checkpoint, whole, parts)
    lines.append(f"run.init_parts: {len(taken.names):,} tensors of {checkpoint}; all others, and AdamW's moments, "
                 "begin anew")  # fmt: skip
    if taken.anew:
        lines.append("run.init_parts: projector and newline begin anew: they have the width of another text model")
    return lines


def check_eyes(checkpoint: Path, model: ModelConfig) -> list[str]:
    """Refuse a checkpoint whose eyes a model cannot take (`run.init_eyes`), and return lines on what it takes.

    Raises:
        ConfigError: the checkpoint has no eyes, or others.
    """
    if read_meta(checkpoint)["config"]["model"].get("vision") is None:
        raise ConfigError(EYES_OPTION, checkpoint, "holds a model of text alone", "give a run of a model with eyes")
    lines = check_same_eyes(EYES_OPTION, checkpoint, model, heads=False)
    taken = taken_parts(checkpoint, meta_model(model), EYES, EYES_OPTION)
    return [*lines, *eyes_lines(checkpoint, len(taken.names), taken.anew)]


def eyes_lines(source: Path, tensors: int, anew: Sequence[str]) -> list[str]:
    """Return lines on eyes that a run takes from a checkpoint or a folder.

    Args:
        source: that they are in.
        tensors: parameters that are taken.
        anew: those that begin anew.
    """
    line = f"{EYES_OPTION}={source}: {tensors:,} tensors of the eyes; AdamW's moments begin at 0"
    return (
        [line, f"{EYES_OPTION}: projector and newline begin anew: it has none for this text model"] if anew else [line]
    )


def check_same_eyes(option: str, checkpoint: Path, model: ModelConfig, *, heads: bool = True) -> list[str]:
    """Refuse to read eyes of other shapes, and return a line if their positions are interpolated.

    Tiles of another size are no other eyes. A checkpoint of text alone has none, nor a model of text: nothing is said.

    Args:
        option: that gave the checkpoint.
        checkpoint: whose eyes are read.
        model: that they are for.
        heads: the contrastive loss's maps are read too, if the model has them.

    Raises:
        ConfigError: naming the first option of the eyes that differs.
    """
    recorded, now = read_meta(checkpoint)["config"]["model"].get("vision"), model.vision
    if recorded is None or now is None:
        return []
    for name in (*(field.name for field in marked_fields(VisionConfig, SHAPES_WEIGHTS)), *_BESIDE_SHAPES):
        before, value = recorded.get(name, getattr(VisionConfig(), name)), getattr(now, name)
        if name != "tile_size" and before != value:
            raise ConfigError(f"model.vision.{name}", value, f"{option}={checkpoint} holds eyes with {before}",
                              "give that value, or another checkpoint")  # fmt: skip
    if heads and now.contrastive is not None:
        there = (recorded.get("contrastive") or {}).get("size")
        if there != now.contrastive.size:
            holds = "none" if there is None else f"one of {there}"
            raise ConfigError("model.vision.contrastive.size", now.contrastive.size,
                              f"{option}={checkpoint} holds {holds}",
                              'give that size, or leave it out: run.init_parts=["*", "!contrastive"]')  # fmt: skip
    tile = recorded["tile_size"]
    if tile == now.tile_size:
        return []
    return [f"model.vision.tile_size={now.tile_size}: position embeddings of tiles of {tile} are interpolated"]

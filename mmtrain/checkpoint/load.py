"""Loading of a checkpoint into a model of any layout, and whether the model is that of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from mmtrain.checkpoint.init_parts import taken_parts
from mmtrain.checkpoint.positions import StoredPositions
from mmtrain.checkpoint.progress import FROZEN, RECORD, read_meta
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.checkpoint.save import BY_PARAMETER, state_of
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.config.option_marks import SHAPES_WEIGHTS, marked_fields
from mmtrain.errors import ConfigError
from mmtrain.model.frozen import is_frozen

EYES = "encoder.", "contrastive."
"""What the names of the parameters begin with that a model with eyes has besides a text model's."""


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    parts: Sequence[str] = (),
    option: str = "run.init_from",
) -> None:
    """Read weights, and optimizer state where an optimizer is given, into the sharded model. Collective.

    The model must have the checkpoint's shapes (:func:`check_same_model`). Of a checkpoint of text a model with eyes
    takes all that it has: the eyes keep their values, and their optimizer state begins anew. A buffer that the
    checkpoint lacks, written without the option that needs it, keeps its value. Optimizer state of parameters that are
    trained now and were frozen when it was saved begins anew, at zero and with no step done; that of those that are
    frozen now is not read. Position embeddings of the eyes that were trained on tiles of another size are interpolated,
    and their state begins anew likewise.

    Args:
        path: folder of the checkpoint.
        model: laid out.
        optimizer: of the model; None reads weights alone.
        parts: patterns of what is read (`run.init_parts`), without an optimizer; the rest stays as it is. Empty reads
            all.
        option: that named the checkpoint, where there is no optimizer.

    Raises:
        ConfigError: the checkpoint is damaged, or its optimizer's state is not in the form that this version writes.
    """
    option = option if optimizer is None else "run.resume"
    metadata = metadata_of(option, path)
    known = metadata.state_dict_metadata
    optional = {name for name, _ in model.named_buffers() if f"model.{name}" not in known}
    text_alone = not any(name.removeprefix("model.").startswith(EYES) for name in known)
    optional |= {name for name, _ in model.named_parameters() if text_alone and name.startswith(EYES)}
    if optimizer is None:
        weights = get_model_state_dict(model)
        if parts:
            optional = weights.keys() - taken_parts(path, model, parts, option).names
        wanted = _without(weights, optional)
        positions = StoredPositions(metadata, wanted)
        load_shards(option, path, metadata, {"model": positions.in_place_of(wanted)})
        positions.put(weights)
        set_model_state_dict(model, weights)
    else:
        weights, moments = state_of(model, optimizer)
        lacking = {name: value for name, value in moments.items() if f"optimizer.{name}" not in known}
        positions = StoredPositions(metadata, weights)
        new = _of_frozen(path, lacking) if lacking else {}
        new |= {name: value for name, value in moments.items() if _is_state_of(name, positions.names)}
        eyes = {name: value for name, value in lacking.items() if name.partition(".")[2].startswith(EYES)}
        new |= eyes if text_alone else {}
        stored = _without(moments, new.keys())
        if missing := next((f"optimizer.{name}" for name in stored if f"optimizer.{name}" not in known), None):
            raise ConfigError("run.resume", str(path), f"holds the optimizer's state in another form: no {missing}",
                              f"start from its weights: run.init_from={path} run.init_optimizer=false")  # fmt: skip
        wanted = positions.in_place_of(_without(weights, optional))
        load_shards(option, path, metadata, {"model": wanted, "optimizer": stored})
        positions.put(weights)
        for value in new.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        moments = stored | new
        if not moments:  # this rank of a pipeline trains nothing
            set_model_state_dict(model, weights)
            return
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=BY_PARAMETER)


def check_same_model(option: str, checkpoint: Path, model: ModelConfig) -> None:
    """Refuse to read weights of a model with other shapes, before anything is started.

    An option that the checkpoint's record lacks, because it was written before there was such an option, counts as the
    option's default.

    Raises:
        ConfigError: naming every option of the model that differs, or the eyes that one of both lacks; but a run
            with eyes may start from the weights of text (`is_text_alone`).
    """
    recorded = read_meta(checkpoint)["config"]["model"]
    _check_shapes(option, checkpoint, "model", recorded, model)
    eyes = recorded.get("vision")
    if model.vision is not None and eyes is not None:
        if option == "run.init_from":  # `init_parts.check_same_eyes` knows what else may differ
            return
        _check_shapes(option, checkpoint, "model.vision", eyes, model.vision)
    elif eyes is not None:
        raise ConfigError("model.vision", None, f"{option}={checkpoint} holds a model with eyes",
                          f"give its model, model={recorded.get('name')}, or another checkpoint")  # fmt: skip
    elif model.vision is not None and option != "run.init_from":
        raise ConfigError("model.vision", f"{{hidden_size: {model.vision.hidden_size}, ...}}",
                          f"{option}={checkpoint} holds a model of text alone",
                          "start another run from its weights with run.init_from, whose eyes begin anew")  # fmt: skip


def is_text_alone(checkpoint: Path) -> bool:
    """Tell whether a checkpoint holds a model without eyes."""
    return read_meta(checkpoint)["config"]["model"].get("vision") is None


def _check_shapes(
    option: str, checkpoint: Path, path: str, recorded: Mapping[str, Any], now: ModelConfig | VisionConfig
) -> None:
    """Refuse a group of options of which some that shape weights are not as a checkpoint has them; all are named."""
    different = []
    for field in marked_fields(type(now), SHAPES_WEIGHTS):
        default = None if field.default is MISSING else field.default
        there, here = recorded.get(field.name, default), getattr(now, field.name)
        if there != here:
            different.append((f"{path}.{field.name}", there, here))
    if different:
        (name, there, here), *others = different
        more = "".join(f"; {other} {then} there, {value} here" for other, then, value in others)
        fix = "give the values there" if others else "give that value"
        raise ConfigError(name, here, f"{option}={checkpoint} holds a model with {there}{more}",
                          f"{fix}, or another checkpoint")  # fmt: skip


def _of_frozen(path: Path, moments: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of the optimizer's state of those parameters that were frozen when a checkpoint was saved."""
    frozen = read_meta(path).get(FROZEN, []) if (path / RECORD).exists() else []
    return {name: value for name, value in moments.items() if is_frozen(_parameter_of(name), frozen)}


def _parameter_of(name: str) -> str:
    """Return the parameter that an entry of the optimizer's state is of: state.NAME.exp_avg, param_groups.NAME.lr."""
    return name.partition(".")[2].rpartition(".")[0]


def _is_state_of(name: str, parameters: Set[str]) -> bool:
    """Tell whether an entry is a moment, or the count of steps, of one of these parameters."""
    return name.startswith("state.") and _parameter_of(name) in parameters


def _without(weights: dict[str, Any], names: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name not in names}

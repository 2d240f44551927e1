"""Loading of a checkpoint into a model of any layout, and whether the model is that of the checkpoint."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.checkpoint.save import BY_PARAMETER
from mmtrain.config import ModelConfig
from mmtrain.config.option_marks import SHAPES_WEIGHTS, marked_fields
from mmtrain.errors import ConfigError


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Read weights, and optimizer state where an optimizer is given, into the sharded model. Collective.

    The model must have the checkpoint's shapes (:func:`check_same_model`). A buffer that the checkpoint lacks, written
    without the option that needs it, keeps its value.

    Raises:
        ConfigError: the checkpoint is damaged, or its optimizer's state is not in the form that this version writes.
    """
    option = "run.init_from" if optimizer is None else "run.resume"
    metadata = metadata_of(option, path)
    known = metadata.state_dict_metadata
    optional = {name for name, _ in model.named_buffers() if f"model.{name}" not in known}
    if optimizer is None:
        weights = get_model_state_dict(model)
        load_shards(option, path, metadata, {"model": _without(weights, optional)})
        set_model_state_dict(model, weights)
    else:
        weights, moments = get_state_dict(model, optimizer, options=BY_PARAMETER)
        if missing := next((f"optimizer.{name}" for name in moments if f"optimizer.{name}" not in known), None):
            raise ConfigError("run.resume", str(path), f"holds the optimizer's state in another form: no {missing}",
                              f"start from its weights: run.init_from={path} run.init_optimizer=false")  # fmt: skip
        load_shards(option, path, metadata, {"model": _without(weights, optional), "optimizer": moments})
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=BY_PARAMETER)


def check_same_model(option: str, checkpoint: Path, model: ModelConfig) -> None:
    """Refuse to read weights of a model with other shapes, before anything is started.

    An option that the checkpoint's record lacks, because it was written before there was such an option, counts as the
    option's default.

    Raises:
        ConfigError: naming the first option of the model that differs.
    """
    recorded = read_meta(checkpoint)["config"]["model"]
    for field in marked_fields(ModelConfig, SHAPES_WEIGHTS):
        default = None if field.default is MISSING else field.default
        before, now = recorded.get(field.name, default), getattr(model, field.name)
        if before != now:
            raise ConfigError(f"model.{field.name}", now, f"{option}={checkpoint} holds a model with {before}",
                              "give that value, or another checkpoint")  # fmt: skip


def _without(weights: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name not in names}

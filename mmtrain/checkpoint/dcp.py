"""Checkpoints with torch's distributed checkpoint: every rank writes its shards, and a folder appears when whole."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from mmtrain.checkpoint.run_folder import complete_checkpoints, latest_checkpoint
from mmtrain.config import ModelConfig
from mmtrain.config.option_marks import SHAPES_WEIGHTS, marked_fields
from mmtrain.errors import ConfigError

# The optimizer's state is saved by parameter, not by group: ranks of a pipeline have groups of other parameters.
_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Progress:
    """Steps and tokens that a run has done; everything else follows from the configuration.

    Attributes:
        step: optimizer steps done.
        tokens: tokens consumed.
    """

    step: int = 0
    tokens: int = 0


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: dict[str, Any],
    rope_base: float,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `folder`/step-N: weights, optimizer state, progress, the configuration and the RoPE base. Collective.

    Shards go to a scratch folder that is renamed when all ranks have written theirs, so a checkpoint under its final
    name is always whole, and an interrupted one leaves the older ones as they were.

    Args:
        folder: the run's folder of checkpoints.
        model: the model as it is laid over the ranks.
        optimizer: its optimizer.
        progress: where the run stands.
        config: every option of the run.
        rope_base: base that the last step was trained with; it cannot be read off the weights.
        extra: more entries of the record, as JSON.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / f"step-{progress.step:08d}"
    scratch = folder / f"{final.name}.writing"
    if dist.get_rank() == 0 and scratch.exists():
        shutil.rmtree(scratch)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
    _quietly(dcp.save, {"model": weights, "optimizer": moments}, checkpoint_id=scratch)
    dist.barrier()
    if dist.get_rank() == 0:
        meta = {**asdict(progress), "rope_base": rope_base, "config": config, **(extra or {})}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        _swap_in(scratch, final)
    dist.barrier()
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Progress:
    """Read weights, and optimizer state where an optimizer is given, into the sharded model. Collective.

    The model must have the checkpoint's shapes (:func:`check_same_model`). A buffer that the checkpoint lacks, written
    without the option that needs it, keeps its value.

    Raises:
        ConfigError: the optimizer's state is not in the form that this version writes.
    """
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    optional = {name for name, _ in model.named_buffers() if f"model.{name}" not in known}
    if optimizer is None:
        weights = get_model_state_dict(model)
        _quietly(dcp.load, {"model": _without(weights, optional)}, checkpoint_id=path)
        set_model_state_dict(model, weights)
    else:
        weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
        if missing := next((f"optimizer.{name}" for name in moments if f"optimizer.{name}" not in known), None):
            raise ConfigError("run.resume", str(path), f"holds the optimizer's state in another form: no {missing}",
                              f"start from its weights: run.init_from={path} run.init_optimizer=false")  # fmt: skip
        _quietly(dcp.load, {"model": _without(weights, optional), "optimizer": moments}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_BY_PARAMETER)
    return read_progress(path)


def read_meta(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint: progress, RoPE base (old ones lack it) and configuration."""
    return json.loads((path / "meta.json").read_text())


def read_progress(path: Path) -> Progress:
    """Return how far the run was when a checkpoint was saved."""
    meta = read_meta(path)
    return Progress(meta["step"], meta["tokens"])


def find_checkpoint(option: str, path: str) -> Path:
    """Return the newest complete checkpoint at or below `path`.

    Raises:
        ConfigError: there is none.
    """
    found = latest_checkpoint(Path(path))
    if found is None:
        raise ConfigError(option, path, "holds no complete checkpoint", "give a run folder or one of its checkpoints")
    return found


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


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all); on the main process only."""
    complete = complete_checkpoints(folder)
    for path in complete[:-keep] if keep else []:
        shutil.rmtree(path)


def _without(weights: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name not in names}


def _swap_in(scratch: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one that has it already (a step run again) goes only once it is in place."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(scratch, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _quietly(call: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations
        call(*args, **kwargs)

"""Checkpoints with torch's distributed checkpoint: every rank writes its shards, and a folder appears when whole."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.durable import sync_folder, write_text
from mmtrain.checkpoint.hashed_writer import HashedWriter
from mmtrain.checkpoint.listing import REPLACED, WRITING
from mmtrain.checkpoint.manifest import FileSum, write_manifest
from mmtrain.checkpoint.progress import FORMAT, RECORD, Progress, read_meta
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.config import ModelConfig
from mmtrain.config.option_marks import SHAPES_WEIGHTS, marked_fields
from mmtrain.errors import ConfigError, brief

# The optimizer's state is saved by parameter, not by group: ranks of a pipeline have groups of other parameters.
_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


class SaveFailed(Exception):
    """A checkpoint that could not be written; nothing of it is left, and the older ones are as they were.

    Raised on all ranks alike. The message names the rank that failed, and why.
    """

    EXIT_CODE = 1


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: dict[str, Any],
    rope_base: float,
    extra: dict[str, Any] | None = None,
    attach: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder`/step-N: weights, optimizer state, progress, the configuration and the RoPE base. Collective.

    Shards go to a scratch folder that is renamed when all ranks have written theirs and everything is on the disk, so a
    checkpoint under its final name is always whole, and an interrupted one leaves the older ones as they were. Each
    rank hashes what it writes; the main process puts all checksums into the manifest.

    Args:
        folder: the run's folder of checkpoints.
        model: the model as it is laid over the ranks.
        optimizer: its optimizer.
        progress: where the run stands.
        config: every option of the run.
        rope_base: base that the last step was trained with; it cannot be read off the weights.
        extra: more entries of the record, as JSON.
        attach: writes more files into the folder before it gets its name; called on the main process.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveFailed: a rank could not write, for want of room, say; on all ranks, which may go on.
    """
    final = folder / f"step-{progress.step:08d}"
    scratch = folder / f"{final.name}{WRITING}"
    try:
        on_main(lambda: shutil.rmtree(scratch) if scratch.exists() else None)
        weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecations
            dcp.save({"model": weights, "optimizer": moments}, storage_writer=(writer := HashedWriter(scratch)))
        hashed = _of_all_ranks(writer.sums())
        meta = {"format": FORMAT, **asdict(progress), "rope_base": rope_base, "config": config, **(extra or {})}
        on_main(lambda: _finish(scratch, final, meta, hashed, attach))
    except CheckpointException as error:  # of one rank or several; all ranks get it
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise
        _discard(scratch)
        raise SaveFailed(f"{final} could not be written: {_why(cause)} (rank {rank})") from error
    except OSError as error:
        _discard(scratch)
        raise SaveFailed(f"{final} could not be written: {_why(error)} (rank 0)") from error
    return final


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
        weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
        if missing := next((f"optimizer.{name}" for name in moments if f"optimizer.{name}" not in known), None):
            raise ConfigError("run.resume", str(path), f"holds the optimizer's state in another form: no {missing}",
                              f"start from its weights: run.init_from={path} run.init_optimizer=false")  # fmt: skip
        load_shards(option, path, metadata, {"model": _without(weights, optional), "optimizer": moments})
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_BY_PARAMETER)


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


def _of_all_ranks(mine: dict[str, FileSum]) -> dict[str, FileSum]:
    """Return the checksums of the files that all ranks wrote; each file has one writer."""
    found: list[dict[str, FileSum]] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return {name: made for sums in found for name, made in sums.items()}


def _finish(
    scratch: Path,
    final: Path,
    meta: dict[str, Any],
    hashed: dict[str, FileSum],
    attach: Callable[[Path], None] | None = None,
) -> None:
    """Write the record, the manifest as the last file, and give the checkpoint its name; torch has synced shards."""
    if attach is not None:
        attach(scratch)
    write_text(scratch / RECORD, json.dumps(meta, indent=1) + "\n")
    write_manifest(scratch, meta["step"], hashed)
    _swap_in(scratch, final)
    sync_folder(final.parent)


def _swap_in(scratch: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one that has it already (a step run again) goes only once it is in place."""
    replaced = final.with_name(f"{final.name}{REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(scratch, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _discard(scratch: Path) -> None:
    """Remove what was written of a checkpoint that failed, once no rank writes any more."""
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)


def _why(cause: BaseException) -> str:
    return cause.strerror or str(cause) if isinstance(cause, OSError) else brief(cause)

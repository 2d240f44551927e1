"""Reading of single parameters from a checkpoint of ours or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.errors import ConfigError, brief
from mmtrain.hf.folder import HFFolder
from mmtrain.hf.read_weights import read_parameter
from mmtrain.infer.quantised.stream import WeightReader

_ELEMENTS = 1 << 24  # looked at once, so that the look takes no memory to speak of


def weight_reader(path: Path, folder: HFFolder | None) -> WeightReader:
    """Return the way to the weights of a checkpoint; a Hugging Face folder where that is given.

    Raises:
        ConfigError: the checkpoint's index cannot be read.
    """
    metadata = None if folder is not None else metadata_of("checkpoint", path)

    def read(name: str, shape: Sequence[int]) -> Tensor:
        if folder is not None:
            weight = _of_folder(folder, name, shape)
        else:
            state = {"model": {name: torch.empty(tuple(shape))}}
            load_shards("checkpoint", path, metadata, state, alone=True)
            weight = state["model"][name]
        check_finite(name, weight, path)
        return weight

    return read


def check_finite(name: str, weight: Tensor, path: Path) -> None:
    """Refuse weights that are not finite numbers.

    Raises:
        ConfigError: they are not; the message names the parameter and the checkpoint.
    """
    if not all(torch.isfinite(part).all() for part in weight.flatten().split(_ELEMENTS)):
        raise ConfigError("checkpoint", path, f"holds weights that are not finite numbers ({name})",
                          "its run diverged: give an earlier checkpoint")  # fmt: skip


def _of_folder(folder: HFFolder, name: str, shape: Sequence[int]) -> Tensor:
    try:
        with torch.no_grad():
            return read_parameter(folder, name, shape)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError("checkpoint", folder.path, f"cannot be read: {brief(error)}", "give a whole folder") from None

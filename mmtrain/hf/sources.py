"""What weights are exported from: a checkpoint, another Hugging Face folder, or a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mmtrain.checkpoint.tensors import StoredTensors
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import HFFolder
from mmtrain.hf.read_weights import read_parameter


class WeightSource(Protocol):
    """Giver of a model's parameters, one at a time."""

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a whole parameter of ours on the host, float32."""


class CheckpointWeights:
    """The weights of a checkpoint of any layout, read without a process group.

    Args:
        path: folder of a whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, StoredTensors(path)

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a parameter's master weights.

        Raises:
            ConfigError: it is not there, or has another shape.
        """
        found = self._tensors.shapes.get(f"model.{name}")
        if found != tuple(shape):
            problem = f"holds {name} " + (f"of shape {found}, not {tuple(shape)}" if found else "nowhere")
            raise ConfigError("checkpoint", self._path, problem, "give another checkpoint")
        return self._tensors.whole(f"model.{name}").float()


class FolderWeights:
    """The weights of a Hugging Face folder, of either naming."""

    def __init__(self, folder: HFFolder) -> None:
        self._folder = folder

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a parameter, put together from the tensors that hold it."""
        return read_parameter(self._folder, name, shape)


class ModuleWeights:
    """The weights of a model in this process's memory."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a parameter."""
        return self._parameters[name].detach().float().cpu()

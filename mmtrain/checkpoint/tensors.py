"""Reading of a checkpoint's tensors one by one, in one process, whatever layout wrote them and without a model."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mmtrain.checkpoint.safe_load import metadata_of
from mmtrain.checkpoint.safetensors_file import TensorFile
from mmtrain.checkpoint.tensor_index import Place
from mmtrain.errors import ConfigError

_SLICE = 1 << 22  # elements that are turned to float64 at a time
_PREFIXES = {"model": "model.", "optimizer": "optimizer.state."}
_LAYER = re.compile(r"layers\.\d+")


class StoredTensors:
    """The tensors of a checkpoint, each read when it is asked for, whole or by the parts that ranks wrote.

    Args:
        checkpoint: its folder.

    Attributes:
        shapes: of all tensors, by name: ``model.NAME`` and ``optimizer.state.NAME.exp_avg``, in the order of the file.

    Raises:
        ConfigError: its index cannot be read or is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint
        metadata = metadata_of("checkpoint", checkpoint)
        entries = metadata.state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._places = metadata.storage_data
        self._files: dict[str, TensorFile] = {}
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type of a tensor."""
        return self._tensors[name].properties.dtype

    def bytes_of(self, name: str) -> int:
        """Return how many bytes the elements of a tensor take."""
        return math.prod(self.shapes[name]) * self.dtype(name).itemsize

    def parts(self, name: str) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        """Yield each rank's part of a tensor with its place in the whole.

        Raises:
            ConfigError: it cannot be read, or is not what `.metadata` says.
        """
        for chunk in self._tensors[name].chunks:
            part = self._read(name, MetadataIndex(name, chunk.offsets))
            if part.shape != chunk.sizes:
                raise self._damaged(f"{name} has a part of shape {tuple(part.shape)}, not {tuple(chunk.sizes)}")
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            yield tuple(slice(start, start + length) for start, length in ends), part

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor put together of its parts, not to be written to (ConfigError as for :meth:`parts`)."""
        if len(self._tensors[name].chunks) == 1:
            return next(self.parts(name))[1]
        made = torch.empty(self.shapes[name], dtype=self.dtype(name))
        for place, part in self.parts(name):
            made[place] = part
        return made

    def square_sum(self, name: str) -> float:
        """Return the sum of the squares of a tensor's elements, in float64 (ConfigError as for :meth:`parts`)."""
        return sum(square_sum(part) for _, part in self.parts(name))

    def _read(self, name: str, index: MetadataIndex) -> torch.Tensor:
        place = self._places.get(index)
        if place is None:
            raise self._damaged(f"{name} has a part that is in no file")
        file = place.file if isinstance(place, Place) else place.relative_path
        try:
            found = self._raw(place) if isinstance(place, Place) else self._pickled(place)
        except OSError as error:
            raise self._damaged(f"{file}: {error.strerror}") from error
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(f"{name} cannot be read from {file}") from error
        if not isinstance(found, torch.Tensor):
            raise self._damaged(f"{name} is not a tensor in {file}")
        return found

    def _raw(self, place: Place) -> torch.Tensor:
        if place.file not in self._files:
            self._files[place.file] = TensorFile(self._path / place.file)
        return self._files[place.file].tensor(place.entry)

    def _pickled(self, place: _StorageInfo) -> Any:
        with (self._path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError("checkpoint", self._path, f"damaged: {what}", "give another checkpoint")


def square_sum(values: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """Return the sum of squares of a tensor, or of its difference from another of its shape, in float64."""
    total = 0.0
    theirs = [None] * -(-values.numel() // _SLICE) if other is None else other.reshape(-1).split(_SLICE)
    for mine, subtracted in zip(values.reshape(-1).split(_SLICE), theirs, strict=values.numel() > 0):
        exact = mine.double() if subtracted is None else mine.double() - subtracted.double()
        total += float(exact.square().sum())
    return total


def place_in_model(name: str) -> tuple[str, str] | None:
    """Return the layer and the kind of a stored tensor: ``("layers.3", "weights")``, ``("norm", "exp_avg")``.

    None where it is neither a weight nor a moment, a count of steps, say.
    """
    if name.startswith(_PREFIXES["model"]):
        inner, kind = name.removeprefix(_PREFIXES["model"]), "weights"
    elif name.startswith(_PREFIXES["optimizer"]) and name.endswith((".exp_avg", ".exp_avg_sq")):
        inner, _, kind = name.removeprefix(_PREFIXES["optimizer"]).rpartition(".")
    else:
        return None
    layer = _LAYER.match(inner)
    return (layer[0] if layer else inner.partition(".")[0]), kind

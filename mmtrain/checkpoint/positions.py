"""Position embeddings of the eyes in a checkpoint whose tiles have another number of patches than the model's.

A vision transformer trained on tiles of 224 pixels goes on with tiles of 336: its 16 x 16 embeddings become 24 x 24.

Legend: Q tokens of a tile (the class token and its patches), W width, N patches of the new side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mmtrain.model.elements import local_part

POSITIONS = "encoder.vision_tower.embedding.position_QW"


def resize_positions(position_QW: Tensor, tokens: int) -> Tensor:
    """Return embeddings [tokens, W] interpolated bicubically on the grid of patches; the class token keeps its own.

    Args:
        position_QW: the class token's embedding, then those of a square of patches, row by row; fp32.
        tokens: 1 + N^2.
    """
    before, now = (math.isqrt(count - 1) for count in (len(position_QW), tokens))
    grid_1WSS = position_QW[1:].view(before, before, -1).permute(2, 0, 1)[None]
    made = F.interpolate(grid_1WSS, size=(now, now), mode="bicubic", align_corners=False)
    return torch.cat([position_QW[:1], made[0].permute(1, 2, 0).reshape(now * now, -1)])


class StoredPositions:
    """Positions of another size on their way from a checkpoint into a model.

    Args:
        metadata: of the checkpoint.
        weights: of the model, by name.

    Attributes:
        names: of the parameters that change their size: that of the positions, or none.
    """

    def __init__(self, metadata: Metadata, weights: dict[str, Any]) -> None:
        stored, mine = stored_shape(metadata, POSITIONS), weights.get(POSITIONS)
        differ = stored is not None and mine is not None and is_square(stored, tuple(mine.shape))
        self._stored = torch.empty(stored) if differ else None
        self.names = frozenset({POSITIONS} if differ else ())

    def in_place_of(self, weights: dict[str, Any]) -> dict[str, Any]:
        """What is read of a checkpoint for `weights`: the positions in the checkpoint's own size."""
        return weights if self._stored is None else {**weights, POSITIONS: self._stored}

    @torch.no_grad()
    def put(self, weights: dict[str, Any]) -> None:
        """Fill this rank's part of the model's positions, of what was read."""
        if self._stored is None:
            return
        part, start = local_part(weights[POSITIONS])
        whole_QW = resize_positions(self._stored, weights[POSITIONS].shape[0])
        part.copy_(whole_QW[tuple(slice(at, at + size) for at, size in zip(start, part.shape, strict=True))])


def stored_shape(metadata: Metadata, name: str) -> tuple[int, ...] | None:
    """Return the shape that a checkpoint has of a parameter; None if it has none."""
    found = metadata.state_dict_metadata.get(f"model.{name}")
    return tuple(found.size) if isinstance(found, TensorStorageMetadata) else None


def is_square(stored: tuple[int, ...], mine: tuple[int, ...]) -> bool:
    """Whether positions of one shape become those of another, which differs, by interpolation."""
    squares = all(shape[0] > 1 and math.isqrt(shape[0] - 1) ** 2 == shape[0] - 1 for shape in (stored, mine))
    return stored != mine and stored[1:] == mine[1:] and squares

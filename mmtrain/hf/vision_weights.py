"""The weights of a model's eyes as tensors of the released names, out of a module and back into one of any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmtrain.errors import ConfigError
from mmtrain.hf.naming import Piece
from mmtrain.hf.read_weights import Box, copy_piece
from mmtrain.hf.vision_naming import LANGUAGE_MODEL, holds_no_weights_of_ours, pieces_of_encoder
from mmtrain.model.elements import local_part


def vision_tensors(encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the released files have of the eyes, by name, on the host, in the parameters' dtype.

    Args:
        encoder: a whole :class:`~mmtrain.vision.encoder.ImageEncoder` of plain parameters.
    """
    for parameter, pieces in pieces_of_encoder(encoder).values():
        for piece in pieces:
            yield piece.name, parameter.detach()[piece.at].reshape(piece.shape).cpu()


@torch.no_grad()
def load_vision_tensors(option: str, tensors: Mapping[str, Tensor], encoder: nn.Module) -> None:
    """Copy the eyes' weights out of the tensors of a model in the released layout, checked before the first is copied.

    The text model's tensors may be there too, and what a whole CLIP tower holds besides.

    Args:
        option: the option that the tensors came from, for messages.
        tensors: by their released names; of any float dtype.
        encoder: an :class:`~mmtrain.vision.encoder.ImageEncoder` of plain parameters or DTensors.

    Raises:
        ConfigError: a tensor is missing, is of another shape, or has no place in the model.
    """
    every = pieces_of_encoder(encoder)
    _check(option, tensors, [piece for _, pieces in every.values() for piece in pieces])
    for parameter, pieces in every.values():
        local, start = local_part(parameter)
        for piece in pieces:
            copy_piece(Box(local, start, tuple(parameter.shape)), piece, tensors[piece.name], None)


def _check(option: str, tensors: Mapping[str, Tensor], wanted: list[Piece]) -> None:
    for piece in wanted:
        if piece.name not in tensors:
            raise ConfigError(option, piece.name, "is missing", f"give all {len(wanted):,} tensors of the vision half")
        if tuple(tensors[piece.name].shape) != piece.shape:
            raise ConfigError(option, piece.name, f"is of {list(tensors[piece.name].shape)}, and the model's of "
                              f"{list(piece.shape)}", "give model.vision the values there")  # fmt: skip
    known = {piece.name for piece in wanted}
    for name in tensors:
        if name not in known and not name.startswith(LANGUAGE_MODEL) and not holds_no_weights_of_ours(name):
            raise ConfigError(option, name, "has no place in the model", "give model.vision the values there")

"""Reading of a folder's weights into a model of any layout: each rank copies the slices that it holds, and no others.

Files are mapped one after the other, and slices copied in pieces of a few MiB, so a rank needs no memory on the host
beside its own parameters and the pages of one file that it looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.checkpoint.safetensors_file import Entry, TensorFile
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError, brief
from mmtrain.hf.folder import HFFolder
from mmtrain.hf.folder_names import ENCODER
from mmtrain.hf.naming import Piece
from mmtrain.hf.rope_rows import row_order
from mmtrain.model.elements import local_part, pieces


class Box(NamedTuple):
    """A part of a parameter that lies here.

    Attributes:
        values: it itself, in which it is written.
        start: its first index in the full parameter.
        shape: of the full parameter.
    """

    values: Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]


def load_folder(option: str, folder: HFFolder, module: nn.Module) -> None:
    """Read a checked folder into a model's parameters (plain or DTensors), in place. Collective where there are ranks.

    A model may have a part of the layers, as a stage of a pipeline has. Values are converted to the parameters' dtype:
    exactly, where that is float32. Buffers keep their values, and so do eyes where the folder is of text alone.

    Raises:
        ConfigError: a file cannot be read any more; on all ranks alike.
    """
    read_on_all(option, folder.path, lambda: _load(folder, module.config, dict(module.named_parameters())))


def read_on_all(option: str, path: Path, read: Callable[[], None]) -> None:
    """Read a folder's weights without a graph. Collective where there are ranks: if one fails, all raise.

    Raises:
        ConfigError: a file cannot be read any more; on all ranks alike.
    """
    problem = None
    try:
        with torch.no_grad():
            read()
    except (OSError, ValueError, RuntimeError) as error:
        problem = brief(error)
    for rank, told in enumerate(_told_by_ranks(problem)):
        if told is not None:
            raise ConfigError(option, path, f"cannot be read: {told} (rank {rank})", "give a whole folder")


def _told_by_ranks(problem: str | None) -> list[str | None]:
    if not dist.is_initialized():
        return [problem]
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    return told


def _load(folder: HFFolder, config: ModelConfig, parameters: dict[str, Tensor]) -> None:
    by_file: dict[object, list[tuple[Entry, Piece, str]]] = {}
    names, is_text = folder.names, folder.model.vision is None
    for name, parameter in parameters.items():
        if is_text and name.startswith(ENCODER):
            continue
        for piece in names.pieces(name, tuple(parameter.shape)):
            file, entry = folder.places[piece.name]
            by_file.setdefault(file, []).append((entry, piece, name))
    for file, wanted in sorted(by_file.items()):
        opened = None
        for entry, piece, name in wanted:
            local, start = local_part(parameters[name])
            box = Box(local, start, tuple(parameters[name].shape))
            if local.numel() and _meets(box, piece):
                opened = opened or TensorFile(file)
                copy_piece(box, piece, opened.tensor(entry), _rows(folder, config, piece, box.shape))


def read_parameter(folder: HFFolder, name: str, shape: Sequence[int]) -> Tensor:
    """Return a whole parameter of ours in float32 (bfloat16 and float16 become that exactly)."""
    made = torch.empty(tuple(shape))
    box = Box(made, (0,) * made.ndim, tuple(shape))
    for piece in folder.names.pieces(name, shape):
        file, entry = folder.places[piece.name]
        copy_piece(box, piece, TensorFile(file).tensor(entry), _rows(folder, folder.model, piece, box.shape))
    return made


def _rows(folder: HFFolder, config: ModelConfig, piece: Piece, shape: Sequence[int]) -> Tensor | None:
    """Return which row of the file each row of ours is, where they are in another order."""
    if not (piece.is_rotated and folder.reordered):
        return None
    return row_order(shape[0] // config.head_dim, config.head_dim, config.rotary_dim).argsort()


def _meets(box: Box, piece: Piece) -> bool:
    spans = zip(piece.at, box.start, box.values.shape, strict=False)
    return all(first <= index < first + count for index, first, count in spans)


def copy_piece(box: Box, piece: Piece, source: Tensor, rows: Tensor | None) -> None:
    """Copy what a tensor of a file and a part of a parameter have in common.

    Args:
        box: the part of the parameter.
        piece: what the tensor is of it.
        source: the tensor of the file.
        rows: int64, the row of the file that each row of the full parameter is; None: the same.
    """
    if not _meets(box, piece):
        return
    lead = len(piece.at)
    target = box.values[tuple(i - first for i, first in zip(piece.at, box.start, strict=False))]
    source = source.view(box.shape[lead:])
    for part, start in pieces(target, box.start[lead:]):
        ends = [first + count for first, count in zip(start, part.shape, strict=True)]
        if rows is None:
            part.copy_(source[tuple(map(slice, start, ends))])
        else:
            rest = tuple(map(slice, start[1:], ends[1:]))
            part.copy_(source[(slice(None), *rest)][rows[start[0] : ends[0]]])

"""The eyes in a Hugging Face folder, whatever else it holds: MiniMax-VL-01's, CLIP's, or LLaVA's with CLIP's tower.

All have the tensors of CLIP's vision tower, after different beginnings of their names. A projector was made for the
text model that it lay beside, so only MiniMax-VL-01's is read, and only for a text model of the same width.

Legend: Q positions of a tile (the class token and its patches), W width of the vision transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.build import meta_model
from mmtrain.checkpoint.positions import POSITIONS, is_square, resize_positions
from mmtrain.checkpoint.safetensors_file import BadFile, Entry, TensorFile
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import CONFIG, WEIGHT_DTYPES, read_json, tensor_places
from mmtrain.hf.folder_names import ENCODER
from mmtrain.hf.naming import Piece
from mmtrain.hf.read_weights import Box, copy_piece, read_on_all
from mmtrain.hf.vision_config import MODEL_TYPE
from mmtrain.hf.vision_naming import TOWER, vision_pieces_of
from mmtrain.model.elements import local_part

_CLASS = "embeddings.class_embedding"  # of every CLIP vision tower, once
_TOWER_PARTS = f"{ENCODER}vision_tower."
# Options of ours, the key of CLIP's config.json, and CLIP's default, which such a file may leave out.
_COMPARED = (
    ("patch_size", "patch_size", 32), ("hidden_size", "hidden_size", 768), ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12), ("ffn_hidden_size", "intermediate_size", 3072),
    ("activation", "hidden_act", "quick_gelu"), ("norm_eps", "layer_norm_eps", 1e-5),
)  # fmt: skip


@dataclass(frozen=True)
class EyesFolder:
    """A folder whose eyes fit a model.

    Attributes:
        path: of the folder.
        places: file and entry of every tensor by its name.
        prefix: what the names of its vision tower's tensors begin with.
        taken: names of the model's parameters that are read from it.
        anew: those of the eyes that are not.
        tile: pixels of a tile's side that its positions are of.
    """

    path: Path
    places: Mapping[str, tuple[Path, Entry]]
    prefix: str
    taken: frozenset[str]
    anew: tuple[str, ...]
    tile: int

    def place(self, piece: Piece) -> tuple[Path, Entry] | None:
        """File and entry of a tensor of the released layout, by the name that it has here."""
        name = piece.name
        return self.places.get(self.prefix + name.removeprefix(TOWER) if name.startswith(TOWER) else name)


def open_eyes(option: str, path: str | Path, model: ModelConfig) -> EyesFolder:
    """Read a folder's config.json and headers, and check that its eyes are a model's. No weight is read.

    Tiles of another size are no other eyes: positions are interpolated.

    Args:
        option: the option that the path came from, for messages.
        path: of the folder.
        model: with eyes.

    Raises:
        ConfigError: the first thing that is wrong or does not fit, in one line.
    """
    path = Path(path)
    fix = "give a folder of MiniMax-VL-01, of CLIP's vision tower, or of a model that has one"
    try:
        config, places = read_json(path / CONFIG), tensor_places(path)
        tower = _tower_config(config)
        prefixes = [name.removesuffix(_CLASS) for name in places if name.endswith(_CLASS)]
        if len(prefixes) != 1:
            raise BadFile(f"holds {len(prefixes)} vision towers of CLIP's names")
        _check_options(option, path, tower, model)
        return _fitted(path, config, places, prefixes[0], tower, model)
    except BadFile as error:
        raise ConfigError(option, path, str(error), fix) from error
    except OSError as error:
        raise ConfigError(option, path, f"{error.filename or path}: {error.strerror}", fix) from error


def load_eyes(option: str, folder: EyesFolder, module: nn.Module) -> None:
    """Read a folder's eyes into a model of any layout, in place. Collective where there are ranks.

    Raises:
        ConfigError: a file cannot be read any more; on all ranks alike.
    """
    read_on_all(option, folder.path, lambda: _load(folder, module))


def _tower_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("vision_config", config)
    if not isinstance(found, dict):
        raise BadFile(f"{CONFIG} has a vision_config that is no object")
    kind = found.get("model_type", "clip_vision_model" if found is not config else None)
    if kind != "clip_vision_model":
        raise BadFile(f"{CONFIG} describes no vision tower of CLIP's: model_type is {str(kind)[:80]!r}")
    return found


def _check_options(option: str, path: Path, tower: Mapping[str, Any], model: ModelConfig) -> None:
    """Refuse eyes of other shapes or functions, by the first option of ours that differs."""
    vision = model.vision
    assert vision is not None
    for name, key, default in _COMPARED:
        there, here = tower.get(key, default), getattr(vision, name)
        if there != here:
            raise ConfigError(f"model.vision.{name}", here, f"{option}={path} holds eyes with {str(there)[:80]}",
                              "give that value, or another folder")  # fmt: skip


def _fitted(
    path: Path, config: Mapping[str, Any], places: Mapping[str, tuple[Path, Entry]], prefix: str,
    tower: Mapping[str, Any], model: ModelConfig,
) -> EyesFolder:  # fmt: skip
    """Find the tensors of all parameters of the eyes, and compare their shapes.

    Raises:
        BadFile: one of the vision tower is missing, of another shape, or in a dtype that is not read.
    """
    tile = tower.get("image_size", 224)  # CLIP's default
    vision, every = model.vision, dict(meta_model(model).named_parameters())
    assert vision is not None
    whole = EyesFolder(path, places, prefix, frozenset(), (), tile)
    taken, anew = [], []
    for name in (name for name in every if name.startswith(ENCODER)):
        shape, in_tower = tuple(every[name].shape), name.startswith(_TOWER_PARTS)
        pieces = vision_pieces_of(name.removeprefix(ENCODER), shape, vision.patch_size)
        if not in_tower and config.get("model_type") != MODEL_TYPE:
            anew.append(name)
            continue
        for piece in pieces:
            found = whole.place(piece)
            if found is None:
                raise BadFile(f"lacks {piece.name!r} of its eyes")
            entry = found[1]
            if entry.shape != piece.shape and not (name == POSITIONS and is_square(entry.shape, piece.shape)):
                if not in_tower:
                    anew.append(name)
                    break
                raise BadFile(f"holds {piece.name!r} of {list(entry.shape)}, and the model's is {list(piece.shape)}")
            if entry.dtype not in WEIGHT_DTYPES:
                raise BadFile(f"holds {piece.name!r} in {entry.dtype}; {', '.join(WEIGHT_DTYPES)} are read")
        else:
            taken.append(name)
    return EyesFolder(path, places, prefix, frozenset(taken), tuple(anew), tile)


def _load(folder: EyesFolder, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name not in folder.taken:
            continue
        local, start = local_part(parameter)
        box = Box(local, start, tuple(parameter.shape))
        for piece in vision_pieces_of(name.removeprefix(ENCODER), box.shape, module.config.vision.patch_size):
            found = folder.place(piece)
            assert found is not None  # it was checked
            tensor = TensorFile(found[0]).tensor(found[1])
            copy_piece(box, piece, _resized(tensor, piece) if name == POSITIONS else tensor, None)


def _resized(position_QW: Tensor, piece: Piece) -> Tensor:
    if tuple(position_QW.shape) == piece.shape:
        return position_QW
    return resize_positions(position_QW.to(torch.float32), piece.shape[0])

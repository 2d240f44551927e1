"""A Hugging Face folder, opened: what it holds is known and checked, and none of its weights has been read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.progress import RECORD
from mmtrain.checkpoint.safetensors_file import BadFile, Entry, load_json, read_header
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.errors import ConfigError, brief
from mmtrain.hf.folder_names import FolderNames
from mmtrain.hf.hf_config import OWN
from mmtrain.hf.model_config import read_model_config
from mmtrain.hf.naming import is_stacked

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MOST_JSON = {CONFIG: 4 << 20, INDEX: 32 << 20}  # bytes
WEIGHT_DTYPES = ("F32", "BF16", "F16")
_LONGEST_NAME = 255
_NAMED = 6  # differences that a message lists
_COMPARED = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size",
             "layer_types", "rotary_dim", "num_experts", "top_k", "shared_ffn_hidden_size", "post_norm", "alpha",
             "norm_eps")  # fmt: skip


@dataclass(frozen=True)
class HFFolder:
    """A folder that was checked as a whole.

    Attributes:
        path: of the folder.
        model: the architecture that its config.json describes; its RoPE base is that of its weights.
        stacked: how its experts are named (`mmtrain.hf.naming`).
        reordered: rows of W_q and W_k are in the order of `mmtrain.hf.rope_rows`.
        places: file and entry of every tensor by its name.
        config: its config.json.
    """

    path: Path
    model: ModelConfig
    stacked: bool
    reordered: bool
    places: Mapping[str, tuple[Path, Entry]]
    config: Mapping[str, Any]

    @property
    def names(self) -> FolderNames:
        """Names of its tensors."""
        return FolderNames(self.model, self.stacked)


def is_hf_folder(path: str | Path) -> bool:
    """Tell a Hugging Face folder from a run's folder and from a checkpoint, by what lies in it."""
    path = Path(path)
    if not path.is_dir() or (path / RECORD).exists() or (path / "checkpoints").is_dir():
        return False
    weights = any((path / name).exists() for name in (ONE_FILE, INDEX, "pytorch_model.bin.index.json"))
    return weights or any(found for kind in ("*.safetensors", "pytorch_model*.bin") for found in path.glob(kind))


def open_folder(option: str, path: str | Path) -> HFFolder:
    """Read a folder's config.json, its index and the headers of all its files, and check them against each other.

    Every tensor of the model must be there, with its shape, in float32, bfloat16 or float16, and nothing that the model
    has no place for.

    Args:
        option: the option that the path came from, for messages.
        path: of the folder.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    path = Path(path)
    try:
        return _open(path)
    except BadFile as error:
        raise ConfigError(option, path, str(error), "give a whole folder of a MiniMax-Text-01 model") from error
    except OSError as error:
        name = error.filename or path
        raise ConfigError(option, path, f"{name}: {error.strerror}", "give a whole folder that can be read") from error


def _open(path: Path) -> HFFolder:
    config = read_json(path / CONFIG)
    try:
        told = read_model_config(config)
    except BadFile as error:
        raise BadFile(f"{CONFIG} {error}") from None
    except OverflowError:
        raise BadFile(f"{CONFIG} holds a number that is beyond a float") from None
    places = tensor_places(path)
    stacked = is_stacked(places)
    try:
        _check_shapes(places, FolderNames(told.model, stacked))
    except RuntimeError as error:  # torch's, of a tensor that cannot be
        raise BadFile(f"{CONFIG} describes a model that cannot be ({brief(error)})") from None
    return HFFolder(path, told.model, stacked, told.reordered, places, config)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a folder's config.json or index.

    Raises:
        BadFile: it is none, or larger than such a file can be.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > _MOST_JSON[path.name]:
        raise BadFile(f"{path.name} has {size:,} bytes, {_MOST_JSON[path.name]:,} are allowed")
    try:
        return load_json(path.read_bytes())
    except BadFile as error:
        raise BadFile(f"{path.name} {error}") from None


def tensor_places(path: Path) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor: of the files that an index names, or of all that there are without one.

    Raises:
        BadFile: a file is missing or broken, or the index says something else.
        OSError: one cannot be read.
    """
    if not (path / INDEX).exists():
        names = [ONE_FILE] if (path / ONE_FILE).exists() else sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise BadFile(f"holds no {ONE_FILE} (weights that are pickled, *.bin, are not read: they could run code)")
        return _merge(_headers(path, names))
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise BadFile(f"{INDEX} has no weight_map")
    for tensor, name in index.items():
        if not _is_file_name(name):
            raise BadFile(f"{INDEX} names a file outside the folder, or no file of weights: {str(name)[:80]!r} for "
                          f"{tensor[:80]!r}")  # fmt: skip
    headers = _headers(path, sorted(set(index.values())))
    for tensor, name in index.items():
        if tensor not in headers[name]:
            raise BadFile(f"{name} does not hold {tensor[:120]!r}, which {INDEX} says it does")
    for name, header in headers.items():
        for tensor in header:
            if index.get(tensor) != name:
                raise BadFile(f"{name} holds {tensor[:120]!r}, which {INDEX} does not say")
    return _merge(headers)


def _is_file_name(name: Any) -> bool:
    """Whether a value is the name of a file of weights in the folder itself."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        return False
    return name.endswith(".safetensors") and name == Path(name).name and name[0] != "."


def _headers(path: Path, names: Iterable[str]) -> dict[str, dict[str, Entry]]:
    headers = {}
    for name in names:
        if not (path / name).is_file():
            raise BadFile(f"{name} is missing")
        try:
            headers[name] = {tensor: (path / name, entry) for tensor, entry in read_header(path / name).items()}
        except BadFile as error:
            raise BadFile(f"{name} {error}") from None
    return headers


def _merge(headers: Mapping[str, Mapping[str, tuple[Path, Entry]]]) -> dict[str, tuple[Path, Entry]]:
    places: dict[str, tuple[Path, Entry]] = {}
    for name, header in headers.items():
        for tensor in header:
            if tensor in places:
                raise BadFile(f"{name} and {places[tensor][0].name} both hold {tensor[:120]!r}")
        places.update(header)
    return places


def _check_shapes(places: Mapping[str, tuple[Path, Entry]], names: FolderNames) -> None:
    model = names.model
    needed = model.num_layers * (2 if names.stacked else 1 + max(1, model.num_experts))
    if model.vision is not None:
        needed += 8 * model.vision.num_layers
    if needed > 4 * len(places):
        raise BadFile(f"holds {len(places):,} tensors, and {CONFIG} describes a model of more than {needed:,}")
    wanted, spare = names.file_shapes(), names.routers_of_one()
    missing = [name for name in wanted if name not in places]
    missing = [name for name in missing if name not in spare]
    if missing:
        raise BadFile(f"lacks {len(missing):,} of {len(wanted):,} tensors, {missing[0]!r} for one")
    for name, (file, entry) in places.items():
        if names.holds_no_weights(name):
            continue
        if name not in wanted:
            raise BadFile(f"{file.name} holds {name[:120]!r}, which a model of this {CONFIG} does not have")
        if entry.shape != wanted[name]:
            raise BadFile(f"{file.name} holds {name!r} of {list(entry.shape)}, and {CONFIG} says {list(wanted[name])}")
        if entry.dtype not in WEIGHT_DTYPES:
            raise BadFile(f"{file.name} holds {name!r} in {entry.dtype}; {', '.join(WEIGHT_DTYPES)} are read")


def check_folder(option: str, path: str | Path, model: ModelConfig) -> HFFolder:
    """Open a folder whose weights a model of ours is to start from, and refuse one of another model.

    A folder of text alone starts the text of a model with eyes; the other way round is refused.

    Args:
        option: the option that the path came from.
        path: of the folder.
        model: of the run.

    Raises:
        ConfigError: naming all that differs, in one line; or as :func:`open_folder` does.
    """
    folder = open_folder(option, path)
    differs = [f"{name} {there} there, {here} here" for name, there, here in _differences(folder.model, model)]
    if differs:
        more = f" and {len(differs) - _NAMED} more" if len(differs) > _NAMED else ""
        raise ConfigError(option, path, f"its {CONFIG} is of another model: {'; '.join(differs[:_NAMED])}{more}",
                          "give model=NAME or model.OPTION=VALUE with the values there")  # fmt: skip
    return folder


def _differences(there: ModelConfig, here: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Return name and both values of what differs. A dense layer and one expert are the same function."""
    found = []
    one_expert = there.num_experts in (0, 1) and here.num_experts in (0, 1)
    for name in _COMPARED:
        a, b = (getattr(model, name) for model in (there, here))
        if (name == "num_experts" and one_expert) or (name == "top_k" and (one_expert or not here.num_experts)):
            continue
        if name == "shared_ffn_hidden_size" and one_expert and not here.num_experts:
            b = 0  # which a dense layer does not have
        same = abs(a - b) <= 1e-6 * abs(b) if name in ("alpha", "norm_eps") else a == b
        if not same:
            shown = ("deepnorm_alpha", a, b) if name == "alpha" else (name, a, b)
            found.append(shown)
    return found + _vision_differences(there.vision, here.vision)


def _vision_differences(there: VisionConfig | None, here: VisionConfig | None) -> list[tuple[str, Any, Any]]:
    """Differences of eyes. A folder of text has none to compare; grids and placeholder are data's, not the weights'."""
    if there is None:
        return []
    if here is None:
        return [("vision", "eyes", "none")]
    names = [one.name for one in fields(VisionConfig) if one.name not in ("grids", "image_token")]
    pairs = ((f"vision.{name}", getattr(there, name), getattr(here, name)) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]


def tokenizer_is_bytes(folder: HFFolder) -> bool:
    """Tell whether a folder that we wrote holds the byte tokenizer, spelt as a tokenizer.json."""
    own = folder.config.get(OWN)
    return isinstance(own, dict) and own.get("tokenizer") == "bytes"

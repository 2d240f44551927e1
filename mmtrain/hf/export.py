"""Export of a model into a Hugging Face folder: written tensor by tensor under another name, renamed when whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.checkpoint.durable import sync_file, sync_folder
from mmtrain.checkpoint.safetensors_file import BLOCK, Planned, in_shards, write_tensors
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import CONFIG, INDEX, ONE_FILE
from mmtrain.hf.folder_names import FolderNames
from mmtrain.hf.hf_config import OWN
from mmtrain.hf.model_config import model_config_json, preprocessor_json
from mmtrain.hf.naming import Piece
from mmtrain.hf.port_buffers import buffer_shapes, make_buffer
from mmtrain.hf.rope_rows import row_order
from mmtrain.hf.sources import WeightSource
from mmtrain.hf.target import Target
from mmtrain.hf.tokenizer_files import TextFiles

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        files: of weights.
        bytes: of weights.
        tensors: in them.
    """

    files: int
    bytes: int
    tensors: int


def plan_tensors(model: ModelConfig, target: Target, dtype: torch.dtype) -> dict[str, list[tuple[Planned, Piece]]]:
    """Return, for every parameter of ours, the tensors that it becomes, in the order of the parameters."""
    names = FolderNames(model, target.stacked)
    return {
        name: [(Planned(one.name, dtype, one.shape), one) for one in names.pieces(name, shape)]
        for name, shape in names.parameter_shapes().items()
    }


def exported_bytes(model: ModelConfig, target: Target, dtype: torch.dtype) -> int:
    """Return the size of all weights that an export writes."""
    return sum(planned.bytes for planned, _ in _tensors(model, target, dtype, None))


def export(
    model: ModelConfig,
    source: WeightSource,
    target: Target,
    out: Path,
    dtype: torch.dtype,
    text: TextFiles | None = None,
    longest: int | None = None,
    shard_bytes: int = 5 * 10**9,
    wrote: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write a folder. It appears under its name when all of it is on the disk, or not at all.

    Args:
        model: with the RoPE base that the weights were trained with; :meth:`Target.check` has passed it.
        source: of its weights.
        target: format of the folder.
        out: the folder, which must not exist.
        dtype: of the weights: bfloat16 (rounded to nearest) or float32.
        text: tokenizer and end of text; None: the folder gets none.
        longest: tokens of the longest rows that the model was trained with.
        shard_bytes: size of a file of weights, at most, unless one tensor has more.
        wrote: is told the bytes of each part that was written.

    Raises:
        ConfigError: the folder is there already, or cannot be written; a weight is not a finite number.
    """
    check_out(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".writing", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        scratch.chmod(0o755)  # made for this user alone
        with _cores_left(2):  # to the threads that write and bring to the disk
            made = _write_weights(scratch, model, source, target, dtype, shard_bytes, wrote)
        eos = None if text is None else text.eos
        config = model_config_json(model, target.port, dtype, eos, longest, target.reorders(model))
        if text is not None:
            text.write(scratch, longest)
            config[OWN]["tokenizer"] = "bytes" if text.is_bytes else "json"
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if model.vision is not None:
            facts = json.dumps(preprocessor_json(model.vision), indent=2)
            (scratch / PREPROCESSOR).write_text(facts + "\n", encoding="utf-8")
        for path in scratch.iterdir():
            sync_file(path)
        sync_folder(scratch)
        check_out(out)
        os.rename(scratch, out)
        sync_folder(out.parent)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def check_out(out: Path) -> None:
    """Refuse to write over anything."""
    if out.exists() or out.is_symlink():
        raise ConfigError("output", out, "is there already", "give a folder that is not, or remove it")


def _cannot_write(out: Path, error: OSError) -> ConfigError:
    return ConfigError("output", out, f"cannot be written: {error.strerror} ({error.filename})", "give another folder")


@contextmanager
def _cores_left(count: int) -> Iterator[None]:
    """Have torch's operations run in so many threads less: they spin for a core that they do not get."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - count))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_weights(
    folder: Path,
    model: ModelConfig,
    source: WeightSource,
    target: Target,
    dtype: torch.dtype,
    shard_bytes: int,
    wrote: Callable[[int], None],
) -> Written:
    every = list(_tensors(model, target, dtype, source))
    makers = {planned.name: make for planned, make in every}
    shards = list(in_shards([planned for planned, _ in every], shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = ONE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, (makers[one.name]() for one in shard), wrote=wrote)
        weight_map |= {one.name: name for one in shard}
    total = sum(planned.bytes for planned, _ in every)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Written(len(shards), total, len(every))


def _tensors(
    model: ModelConfig, target: Target, dtype: torch.dtype, source: WeightSource | None
) -> Iterator[tuple[Planned, Callable[[], Tensor | Iterator[Tensor]]]]:
    """Yield every tensor of a folder, and what makes it or its parts: each holds until the next but one is made."""
    names = FolderNames(model, target.stacked)
    shapes, last = names.parameter_shapes(), _Last(source)
    for name, tensors in plan_tensors(model, target, dtype).items():
        for planned, piece in tensors:
            yield planned, partial(_made, last, name, shapes[name], piece, planned, model, target.reorders(model))
    for name, shape in names.routers_of_one().items():
        yield Planned(name, dtype, shape), partial(torch.zeros, shape, dtype=dtype)
    if target.port:
        for name, shape in buffer_shapes(model).items():  # never rounded: decays are no weights
            yield Planned(name, torch.float32, shape), partial(make_buffer, model, name)


class _Last:
    """The parameter that was read last: the tensors that it becomes follow one another."""

    def __init__(self, source: WeightSource | None) -> None:
        self._source, self._name, self._value = source, "", torch.empty(0)
        self._blocks = deque(torch.empty(BLOCK, dtype=torch.uint8) for _ in range(2))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name != self._name:
            assert self._source is not None
            self._value = torch.empty(0)  # the one before goes first
            self._name, self._value = name, self._source.read(name, shape)
        return self._value

    def parts(self, value: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a value flat, in parts and in another dtype, in memory that later ones get too: fresh pages cost more.

        Raises:
            ConfigError: it holds what is no finite bfloat16.
        """
        for part in value.flatten().split(BLOCK // dtype.itemsize):
            if part.dtype != dtype:
                self._blocks.rotate()
                part = self._blocks[0].view(dtype)[: part.numel()].copy_(part)
            self._check_finite(part)
            yield part

    def _check_finite(self, value: Tensor) -> None:
        """Refuse a weight that is no finite bfloat16; a NaN anywhere makes both extremes NaN."""
        if value.dtype == torch.bfloat16 and value.sum().isfinite():
            return  # one that is not finite makes the sum so, which takes less time
        extremes = torch.stack(torch.aminmax(value)).bfloat16()
        if not torch.isfinite(extremes).all():
            problem = "holds weights that are not finite numbers"
            raise ConfigError("checkpoint", self._name, problem, "give an earlier checkpoint")


def _made(
    last: _Last, name: str, shape: tuple[int, ...], piece: Piece, planned: Planned, model: ModelConfig, reorders: bool
) -> Iterator[Tensor]:
    value = last.read(name, shape)[piece.at].reshape(piece.shape)
    if piece.is_rotated and reorders:
        value = value[row_order(shape[0] // model.head_dim, model.head_dim, model.rotary_dim)]
    return last.parts(value, planned.dtype)

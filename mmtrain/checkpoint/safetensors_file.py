"""Files of the safetensors format: headers that are checked before anything is believed, and tensors one at a time.

The format: 8 bytes with the length N of the header, N bytes of JSON that name each tensor's dtype, shape and place, and
the tensors' bytes end to end. A hostile file costs no more memory than a header may have, and nothing of it is run.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.side_thread import SideThread

MOST_HEADER = 16 << 20  # bytes; 100,000 tensors have less
MOST_DIMENSIONS = 8
BLOCK = 4 << 20  # bytes written at a time: small enough to be in the processor's cache still
_SYNC = 64 << 20  # bytes that are brought to the disk while the next ones are written
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "F32": 4, "BF16": 2, "F16": 2}  # fmt: skip


class BadFile(ValueError):
    """What is wrong with a file, as text that follows its name: "is cut short"."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: as the format calls it, "BF16".
        shape: of the tensor.
        begin: its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return every tensor of a file by its name; their bytes are not read.

    Raises:
        BadFile: the file is no whole safetensors file: cut short, or tensors that overlap, leave holes, or have another
            size than their shape says.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BadFile(f"is cut short or no safetensors file: {size:,} bytes, with a header of {length:,}")
        if length > MOST_HEADER:
            raise BadFile(f"has a header of {length:,} bytes, {MOST_HEADER:,} are allowed")
        header = load_json(file.read(length))
    header.pop("__metadata__", None)
    spans = sorted((_span(name, entry) for name, entry in header.items()), key=lambda span: (span[1], span[2]))
    end = 0
    for name, begin, stop, _ in spans:
        if begin != end:
            how = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise BadFile(f"holds {name[:80]!r} at byte {begin:,}, which {how} (to byte {end:,})")
        end = stop
    if 8 + length + end != size:
        raise BadFile(f"is {'cut short' if size < 8 + length + end else 'too long'}: {size:,} bytes, and its header "
                      f"describes {8 + length + end:,}")  # fmt: skip
    return {name: Entry(entry.dtype, entry.shape, 8 + length + begin) for name, begin, _, entry in spans}


def _span(name: str, value: Any) -> tuple[str, int, int, Entry]:
    """Return name, first byte and end of a tensor's data, whose size is that of its shape."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"does not say dtype, shape and data_offsets of {name[:80]!r}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise BadFile(f"holds {name[:80]!r} in the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > MOST_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise BadFile(f"gives {name[:80]!r} a shape or offsets that cannot be")
    begin, end = offsets
    if begin > end or prod(shape) * _SIZES[dtype] != end - begin:
        raise BadFile(f"gives {name[:80]!r} {end - begin:,} bytes, and a shape of {prod(shape):,} elements of {dtype}")
    return name, begin, end, Entry(dtype, tuple(shape), begin)


def _counts(values: Any) -> bool:
    """Whether a value is a list of whole numbers from 0 to 2^50: their products stay within what a disk may hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 50 for value in values)


def load_json(text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        BadFile: it is not JSON, not an object, names a key twice, or is nested beyond reason.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, BadFile) else f"is not JSON ({type(error).__name__})"
        raise BadFile(problem) from None
    if not isinstance(value, dict):
        raise BadFile("holds no JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise BadFile("names something twice")
    return made


class TensorFile:
    """A file whose tensors are views of the bytes on the disk: what is not looked at is not read.

    Args:
        path: of a file whose header was checked.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory it may write to

    def tensor(self, entry: Entry) -> Tensor:
        """Return a tensor; it must not be written to."""
        if not prod(entry.shape):
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        flat = torch.frombuffer(self._bytes, dtype=DTYPES[entry.dtype], count=prod(entry.shape), offset=entry.begin)
        return flat.view(entry.shape)


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        name: in the file.
        dtype: in the file.
        shape: of the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


def header_of(planned: Sequence[Planned]) -> bytes:
    """Return the bytes of a file before the first tensor's; the tensors follow it end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in planned:
        header[one.name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [end, end + one.bytes]}
        end += one.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path,
    planned: Sequence[Planned],
    tensors: Iterable[Tensor | Iterator[Tensor]],
    look: Callable[[memoryview], None] = lambda part: None,
    wrote: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file whose tensors come one at a time, so that no more than two of them are in memory.

    Three things go on at once: a part is made and looked at in a thread, the part before it is handed to the system,
    and the parts before that one are brought to the disk in another thread. A copy of the same bytes has the disk wait
    until all is written: 22 GB took 11.1 s in this way and 20.8 s to copy, on one machine's virtual disk.

    Args:
        path: of the file, which is on the disk when the call returns.
        planned: what it holds, in order.
        tensors: of those dtypes and shapes, in this order, on the host. One may come in flat parts of BLOCK bytes at
            most, each of which holds until the next but one is asked for. Asked for in another thread.
        look: is given every part before it is written, from the file's beginning to its end, in another thread.
        wrote: is told the bytes of every part that was written.

    Raises:
        OSError: it cannot be written.
    """
    parts = _parts(planned, tensors, look)
    made: memoryview | None = None

    def make() -> None:
        nonlocal made
        made = next(parts, None)

    with path.open("wb", buffering=0) as file, SideThread("parts") as maker, SideThread("sync") as syncer:
        behind = 0
        maker.start(make)
        while True:
            maker.wait()
            if (part := made) is None:
                break
            maker.start(make)
            left = part
            while left:
                left = left[file.write(left) :]
            wrote(len(part))
            behind += len(part)
            if behind >= _SYNC and not syncer.is_busy:
                syncer.start(lambda: os.fsync(file.fileno()))
                behind = 0
        syncer.wait()  # what it was told of an error, the call below is not told again
        os.fsync(file.fileno())


def _parts(
    planned: Sequence[Planned], tensors: Iterable[Tensor | Iterator[Tensor]], look: Callable[[memoryview], None]
) -> Iterator[memoryview]:
    header = memoryview(header_of(planned))
    look(header)
    yield header
    for one, tensor in zip(planned, tensors, strict=True):
        left = one.bytes
        if isinstance(tensor, Tensor):
            assert tuple(tensor.shape) == one.shape, one.name
            tensor = iter(tensor.contiguous().flatten().split(BLOCK // one.dtype.itemsize))
        for flat in tensor:
            assert flat.dtype == one.dtype and flat.nbytes <= min(left, BLOCK), one.name
            left -= flat.nbytes
            if flat.nbytes:
                part = memoryview(flat.view(torch.uint8).numpy())
                look(part)
                yield part
        assert left == 0, one.name


def in_shards(planned: Sequence[Planned], most: int) -> Iterator[list[Planned]]:
    """Yield tensors file by file, each of `most` bytes at most, or of one tensor that has more."""
    shard: list[Planned] = []
    held = 0
    for one in planned:
        if shard and held + one.bytes > most:
            yield shard
            shard, held = [], 0
        shard.append(one)
        held += one.bytes
    if shard:
        yield shard

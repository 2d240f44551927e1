"""Reading of a checkpoint's `.metadata` as data: the file is a pickle, and nothing that it names is imported or called.

`torch.distributed.checkpoint` writes its metadata with pickle, and reads it with pickle, which runs what the file asks
for. Here every class that such a file needs is replaced, while it is unpickled, by a stub that only keeps what it is
given; the stubs' contents are then checked and copied into torch's own classes. A name that is not in the list below is
refused, and no name, whatever is done with it, leads to anything but a stub.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_NAME = ".metadata"


class BadMetadata(ValueError):
    """A `.metadata` that is cut short, is garbage, or asks for something that no checkpoint needs."""


def read_metadata(checkpoint: Path) -> Metadata:
    """Read the metadata of a checkpoint folder; no code of the file's choice runs.

    Raises:
        OSError: the file cannot be read.
        BadMetadata: it is not what a checkpoint holds.
    """
    with (checkpoint / FILE_NAME).open("rb") as file:
        try:
            return _metadata(_StubUnpickler(file).load())
        except (BadMetadata, OSError):
            raise
        except Exception as error:  # pickle raises nearly anything for garbage
            raise BadMetadata(f"is empty, cut short or garbage ({type(error).__name__})") from error


class _Stub:
    """What a pickle gives for one object of a class, kept and not used.

    There is no `__dict__`, and `__setstate__` comes before pickle's own setting of attributes, so that a file can
    change neither a stub's behaviour nor a class.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any) -> _Stub:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Stub):
    __slots__ = ()


class _Tensor(_Stub):
    __slots__ = ()


class _Bytes(_Stub):
    __slots__ = ()


class _Chunk(_Stub):
    __slots__ = ()


class _Properties(_Stub):
    __slots__ = ()


class _MemoryFormat(_Stub):
    __slots__ = ()


class _Member(_Stub):
    # What early releases of Python 3.11 write for a member of an enumeration, 3.11.2 for one: its class and name.
    __slots__ = ()


class _Index(_Stub):
    # A key of a dict: stubs are equal and hash alike only by identity, which is right as each is written once.
    __slots__ = ()


class _StorageMeta(_Stub):
    __slots__ = ()


class _Storage(_Stub):
    __slots__ = ()


class _Size(_Stub):
    __slots__ = ()


class _Layout(_Stub):
    __slots__ = ()


class _Path(_Stub):
    __slots__ = ()


_TORCH = "torch.distributed.checkpoint"
_ALLOWED: dict[tuple[str, str], type[_Stub]] = {
    (f"{_TORCH}.metadata", "Metadata"): _Metadata,
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_TORCH}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_TORCH}.metadata", "TensorProperties"): _Properties,
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("builtins", "getattr"): _Member,  # looks nothing up, as all of these
    (f"{_TORCH}.metadata", "MetadataIndex"): _Index,
    (f"{_TORCH}.metadata", "StorageMeta"): _StorageMeta,
    (f"{_TORCH}.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Layout,
    **{(module, name): _Path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class _StubUnpickler(pickle.Unpickler):
    """An unpickler that knows the names of the list alone, each as a whole: a dotted name is not looked into."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (stub := _ALLOWED.get((module, name))) is not None:
            return stub
        if module == "torch" and f"torch.{name}" in _DTYPES:
            return f"torch.{name}"  # a text: there is nothing to call or to change
        raise BadMetadata(f"asks for {module}.{name}, which no checkpoint needs and which could run code")


def _metadata(stub: Any) -> Metadata:
    state = _fields(stub, _Metadata)
    tensors = {_text(name): _entry(entry) for name, entry in _dict(state["state_dict_metadata"]).items()}
    storage = {_index(key): _storage(value) for key, value in _dict(state["storage_data"]).items()}
    planned = {_text(name): _keys(keys) for name, keys in _dict(state.get("planner_data") or {}).items()}
    made = Metadata(tensors, planned or None, storage, StorageMeta())
    made.version = None if (version := state.get("version")) is None else _text(version)  # not of all torch versions
    return made


def _entry(stub: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(stub) is _Bytes:
        return BytesStorageMetadata()
    state = _fields(stub, _Tensor)
    chunks = [_fields(chunk, _Chunk) for chunk in _of(list, state["chunks"])]
    return TensorStorageMetadata(
        _properties(state["properties"]),
        _size(state["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _properties(stub: Any) -> TensorProperties:
    """Data type alone: torch ignores the layout and the rest when it loads, and all of ours are dense and strided."""
    dtype, layout, requires_grad, memory_format, pinned = _of(tuple, _of(_Properties, stub).state)
    if _of(_Layout, layout).args != ("torch.strided",) or not _is_contiguous(memory_format):
        raise BadMetadata("holds a tensor that is not dense")
    return TensorProperties(_DTYPES[_text(dtype)], requires_grad=_of(bool, requires_grad), pin_memory=_of(bool, pinned))


def _is_contiguous(stub: Any) -> bool:
    if type(stub) is _Member:
        return stub.args == (_MemoryFormat, "TORCH_CONTIGUOUS_FORMAT")
    return _of(_MemoryFormat, stub).args == (0,)


def _index(stub: Any) -> MetadataIndex:
    state = _fields(stub, _Index)
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _text(state["fqn"]), None if offset is None else _size(offset), None if index is None else _of(int, index)
    )


def _storage(stub: Any) -> _StorageInfo:
    state = _fields(stub, _Storage)
    name, offset, length = _text(state["relative_path"]), _of(int, state["offset"]), _of(int, state["length"])
    if not name or name[0] == "." or any(character in name for character in "/\\\0"):
        raise BadMetadata(f"names a file outside the checkpoint: {name!r}")
    if offset < 0 or length < 0 or state.get("transform_descriptors"):
        raise BadMetadata(f"describes {name} in a way that no checkpoint needs")
    return _StorageInfo(name, offset, length)


def _size(stub: Any) -> torch.Size:
    (values,) = _of(_Size, stub).args
    return torch.Size([_of(int, value) for value in _of(tuple, values)])


def _keys(keys: Any) -> tuple[str | int, ...]:
    if not all(type(key) in (str, int) for key in _of(tuple, keys)):
        raise BadMetadata("names a tensor by something that is not a text")
    return keys


def _fields(stub: Any, kind: Callable[..., _Stub]) -> dict[str, Any]:
    """The state of a dataclass's stub: a dict from its fields."""
    return _dict(_of(kind, stub).state or {})


def _dict(value: Any) -> dict[Any, Any]:
    return _of(dict, value)


def _text(value: Any) -> str:
    return _of(str, value)


def _of(kind: Any, value: Any) -> Any:
    """Return the value if it is of exactly this type."""
    if type(value) is not kind:
        raise BadMetadata(f"holds {type(value).__name__.lstrip('_')} where {kind.__name__.lstrip('_')} belongs")
    return value

"""Reading of `.metadata`: what torch wrote comes back as it was, and nothing that a file names is called."""

from __future__ import annotations

import enum
import io
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorProperties

from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.metadata import BadMetadata, read_metadata
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.errors import ConfigError
from tests.checkpoint.fake import checkpoint, metadata

STATE = {
    "w": torch.arange(6.0).view(2, 3),
    "half": torch.ones(4, dtype=torch.bfloat16),
    "lr": 0.25,
    "betas": (0.9, 0.95),
}


def save(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint that torch wrote."""
    dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)
    (folder / "meta.json").write_text('{"step": 1, "tokens": 1, "config": {"model": {}}}')
    return folder


@pytest.mark.filterwarnings("ignore")
def test_what_torch_wrote_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "c", STATE)
    mine, theirs = read_metadata(path), dcp.FileSystemReader(path).read_metadata()
    assert mine.state_dict_metadata == theirs.state_dict_metadata and mine.version == getattr(theirs, "version", None)
    assert mine.planner_data == theirs.planner_data
    assert mine.storage_data == theirs.storage_data and damage_of(path) is None
    state = {"w": torch.zeros(2, 3), "half": torch.zeros(4, dtype=torch.bfloat16), "lr": 0.0, "betas": None}
    load(path, {"model": state})
    assert torch.equal(state["w"], STATE["w"]) and torch.equal(state["half"], STATE["half"])
    assert (state["lr"], state["betas"]) == (0.25, (0.9, 0.95))


def load(path: Path, state: dict[str, Any]) -> None:
    load_shards("checkpoint", path, metadata_of("checkpoint", path), state, alone=True)


class Call:
    """An object whose pickle calls something."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def named(module: str, name: str, *args: str) -> bytes:
    """A pickle that looks up a name as protocol 4 does, through every dot, and calls it."""
    out = io.BytesIO()
    pickler = pickle._Pickler(out, 4)
    pickler.write(pickle.PROTO + bytes([4]))
    pickler.save(module)
    pickler.save(name)
    pickler.write(pickle.STACK_GLOBAL)
    pickler.save(args)
    pickler.write(pickle.REDUCE + pickle.STOP)
    return out.getvalue()


MODULE = "torch.distributed.checkpoint.metadata"
HOSTILE = {
    "a call": pickle.dumps(Call(os.mkdir, "CALLED")),
    "a call of protocol 0": pickle.dumps(Call(os.mkdir, "CALLED"), 0),
    "builtins": pickle.dumps(Call(eval, "__import__('os').mkdir('CALLED')")),
    "behind an allowed name's module": named(MODULE, "os.mkdir", "CALLED"),
    "behind an allowed name": named(MODULE, "Metadata.__init__.__globals__", "CALLED"),
    "behind an allowed class": named(MODULE, "MetadataIndex.__class__.__subclasses__"),
    "behind torch": named("torch", "serialization.os.mkdir", "CALLED"),
    "torch's own loader": named("torch", "load", "CALLED"),
    "a dtype that is none": named("torch", "compile", "CALLED"),
    "in a field": pickle.dumps(Metadata({"w": Call(os.mkdir, "CALLED")}, None, {}, None)),
    "as a key": pickle.dumps(Metadata({}, None, {Call(os.mkdir, "CALLED"): 1}, None)),
    "as an allowed function's argument": pickle.dumps(Metadata({"w": Call(torch.Size, Call(os.mkdir, "CALLED"))})),
    "as an enum's argument": pickle.dumps(Call(torch.serialization._get_layout, Call(os.mkdir, "CALLED"))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_runs_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "checkpoints/step-00000003", {"model": {}})
    (path / ".metadata").write_bytes(HOSTILE[name])
    with pytest.raises(BadMetadata, match="asks for "):
        read_metadata(path)
    with pytest.raises(ConfigError, match=r"\.metadata asks for "):
        metadata_of("checkpoint", path)
    assert ".metadata asks for " in str(damage_of(path)) and not (tmp_path / "CALLED").exists()


def setstate(target: Any, state: Any) -> bytes:
    """A pickle that builds `state` into the object that `target` pickles to."""
    return pickle.dumps(target, 2)[:-1] + pickle.dumps(state, 2)[2:-1] + pickle.BUILD + pickle.STOP


@pytest.mark.parametrize("kind", [Metadata, MetadataIndex, TensorProperties, torch.Size, torch.float32])
def test_a_file_changes_no_class(tmp_path: Path, kind: Any) -> None:
    before = dict(vars(kind)) if isinstance(kind, type) else None
    text = setstate(kind, (None, {"__setstate__": "x", "marked": 1}))
    assert any(code.name == "BUILD" for code, _, _ in pickletools.genops(text))
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(BadMetadata):
        read_metadata(tmp_path)
    assert not hasattr(kind, "marked") and (before is None or dict(vars(kind)) == before)
    whole = checkpoint(tmp_path / "checkpoints/step-00000003", {"model": {}})
    assert read_metadata(whole).state_dict_metadata == metadata().state_dict_metadata


class ByName(pickle.Pickler):
    """Writes members of enumerations by their names, as early releases of Python 3.11 do."""

    def __init__(self, file: io.BytesIO, member: str | None = None) -> None:
        super().__init__(file)
        self.member = member

    def reducer_override(self, one: Any) -> Any:
        return (getattr, (type(one), self.member or one.name)) if isinstance(one, enum.Enum) else NotImplemented


@pytest.mark.parametrize("member", [None, "TORCH_CHANNELS_LAST", "__class__"])
def test_an_enumeration_s_member_by_its_name(tmp_path: Path, member: str | None) -> None:
    out, made = io.BytesIO(), metadata()
    ByName(out, member).dump(made)
    assert b"getattr" in out.getvalue()
    (tmp_path / ".metadata").write_bytes(out.getvalue())
    if member is None:
        assert read_metadata(tmp_path).state_dict_metadata == made.state_dict_metadata
        return
    with pytest.raises(BadMetadata, match="not dense"):
        read_metadata(tmp_path)


def change(**fields: Any) -> bytes:
    made = metadata()
    for name, value in fields.items():
        setattr(made, name, value)
    return pickle.dumps(made)


def stored(path: str, offset: int = 0, length: int = 1, transforms: list[str] | None = None) -> dict:
    return {MetadataIndex("model.w", [0, 0], 0): _StorageInfo(path, offset, length, transforms)}


@pytest.mark.parametrize(
    "text",
    [
        change(storage_data=stored("../../etc/passwd")),
        change(storage_data=stored("/etc/passwd")),
        change(storage_data=stored("..")),
        change(storage_data=stored("__0_0.distcp", offset=-1)),
        change(storage_data=stored("__0_0.distcp", transforms=["zstandard"])),
        change(storage_data={"model.w": 1}),
        change(state_dict_metadata=[1]),
        change(state_dict_metadata={"model.w": StorageMeta()}),
        change(planner_data={"model.w": ("model", None)}),
        pickle.dumps({}),
        pickle.dumps(1),
    ],
)
def test_what_does_not_describe_a_checkpoint_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(BadMetadata):
        read_metadata(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_hostile_entry_of_a_shard_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "c", {"w": torch.ones(2), "lr": Call(os.mkdir, "CALLED")})
    with pytest.raises(ConfigError, match=r"checkpoint=.*/c: cannot be read: UnpicklingError"):
        load(path, {"model": {"w": torch.zeros(2), "lr": 0.0}})
    assert not (tmp_path / "CALLED").exists()
    dcp.load({"model": {"w": torch.zeros(2), "lr": 0.0}}, checkpoint_id=path, no_dist=True)
    assert (tmp_path / "CALLED").exists()  # the file does harm where it is not read with care


@pytest.mark.filterwarnings("ignore")
def test_a_hostile_tensor_of_a_shard_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "c", {"w": torch.ones(2)})
    hostile = io.BytesIO()
    torch.save(Call(os.mkdir, "CALLED"), hostile)
    (shard,) = path.glob("*.distcp")
    (entry,) = read_metadata(path).storage_data.values()
    text = hostile.getvalue()
    made = pickle.loads((path / ".metadata").read_bytes())
    made.storage_data = {key: _StorageInfo(entry.relative_path, 0, len(text)) for key in made.storage_data}
    (path / ".metadata").write_bytes(pickle.dumps(made))
    shard.write_bytes(text)
    with pytest.raises(ConfigError, match="cannot be read: UnpicklingError"):
        load(path, {"model": {"w": torch.zeros(2)}})
    assert not (tmp_path / "CALLED").exists()

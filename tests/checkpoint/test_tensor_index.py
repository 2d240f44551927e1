"""Index of a checkpoint's tensors: what was written is read, and nothing hostile is believed."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from mmtrain.checkpoint import tensor_index
from mmtrain.checkpoint.boxes import are_apart, spans_are_apart
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.checkpoint.safetensors_file import Entry, Planned, header_of, read_header, write_tensors
from mmtrain.checkpoint.tensor_index import INDEX, BadIndex, Place, Value, read_index, sizes_of, write_index
from mmtrain.errors import ConfigError

FILE = "rank-00000.safetensors"
SECOND = "rank-00001.safetensors"
GOOD: dict[str, Any] = {
    "tensors": {
        "model.w": {
            "dtype": "F32",
            "shape": [4, 3],
            "parts": [[FILE, 80, [0, 0], [3, 3]], [SECOND, 88, [3, 0], [1, 3]]],
        },
        "model.n": {"dtype": "I64", "shape": [], "parts": [[FILE, 72, [], []]]},
    },
    "values": {"optimizer.lr": 0.5, "optimizer.betas": [0.9, 0.95], "optimizer.fused": None},
}


def write(folder: Path, index: Any) -> Path:
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    metadata = read_index(write(tmp_path, GOOD))
    known, places = metadata.state_dict_metadata, metadata.storage_data
    assert known["model.w"].size == (4, 3) and known["model.w"].properties.dtype == torch.float32
    assert places[MetadataIndex("model.w", [3, 0])] == Place(SECOND, Entry("F32", (1, 3), 88))
    assert isinstance(known["optimizer.lr"], BytesStorageMetadata)
    assert places[MetadataIndex("optimizer.betas")] == Value([0.9, 0.95])
    assert sizes_of(places.values()) == {FILE: 80 + 36, SECOND: 88 + 12}
    write_index(tmp_path, metadata)
    assert json.loads((tmp_path / INDEX).read_text()) == GOOD
    again = read_index(tmp_path)
    assert again.storage_data == places and again.state_dict_metadata == known


def changed(**parts: Any) -> dict[str, Any]:
    """The good index with other entries of its tensor of two parts."""
    made = deepcopy(GOOD)
    made["tensors"]["model.w"] |= parts
    return made


def part(*of: Any) -> dict[str, Any]:
    return changed(parts=[list(of), GOOD["tensors"]["model.w"]["parts"][1]])


HOSTILE: dict[str, tuple[Any, str]] = {
    "empty": ("", "is not JSON"),
    "cut short": (json.dumps(GOOD)[:-9], "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ([], "holds no JSON object"),
    "a key twice": ('{"tensors": {}, "tensors": {}, "values": {}}', "names something twice"),
    "no tensors": ({"values": {}}, "is not a checkpoint's index"),
    "a tensor and a value": ({**GOOD, "values": {"model.w": 1}}, "is not a checkpoint's index"),
    "a path out": (part("../rank-00000.safetensors", 80, [0, 0], [3, 3]), "names a file outside"),
    "a path from the root": (part("/etc/passwd", 80, [0, 0], [3, 3]), "names a file outside"),
    "another file": (part("meta.json", 80, [0, 0], [3, 3]), "names a file outside"),
    "a newline after": (part(FILE + "\n", 80, [0, 0], [3, 3]), "names a file outside"),
    "no file": (part(None, 80, [0, 0], [3, 3]), "names a file outside"),
    "a negative place": (part(FILE, -1, [0, 0], [3, 3]), "at a place that cannot be"),
    "a place that is true": (part(FILE, True, [0, 0], [3, 3]), "at a place that cannot be"),
    "beyond the tensor": (part(FILE, 80, [2, 0], [3, 3]), "lies outside of it"),
    "before the tensor": (part(FILE, 80, [-1, 0], [3, 3]), "lies outside of it"),
    "another number of dimensions": (part(FILE, 80, [0], [9]), "lies outside of it"),
    "a part that is missing": (changed(parts=[[FILE, 80, [0, 0], [3, 3]]]), "not the whole of it"),
    "a part twice": (changed(parts=[[FILE, 80, [0, 0], [2, 3]]] * 2), "not the whole of it"),
    "parts that overlap and leave a hole": (
        changed(parts=[[FILE, 80, [0, 0], [2, 3]], [SECOND, 88, [1, 0], [2, 3]]]),
        "not the whole of it",
    ),
    "parts that overlap in a corner": (
        changed(
            parts=[
                [FILE, 80, [0, 0], [2, 2]],
                [FILE, 96, [1, 1], [2, 2]],
                [SECOND, 88, [3, 0], [1, 3]],
                [SECOND, 100, [0, 2], [1, 1]],
            ]
        ),
        "not the whole of it",
    ),
    "bytes that two parts share": (
        changed(parts=[[FILE, 80, [0, 0], [3, 3]], [FILE, 112, [3, 0], [1, 3]]]),
        "parts that overlap in rank-00000",
    ),
    "bytes that two tensors share": (
        changed(parts=[[FILE, 72, [0, 0], [3, 3]], [SECOND, 88, [3, 0], [1, 3]]]),
        "parts that overlap in rank-00000",
    ),
    "no parts": (changed(parts=[]), "not the whole of it"),
    "a part of three": (changed(parts=[[FILE, 80, [0, 0]]]), "that is none"),
    "an unknown dtype": (changed(dtype="F4"), "unknown dtype"),
    "a dtype that is a list": (changed(dtype=["F32"]), "unknown dtype"),
    "absurd elements": (changed(shape=[1 << 49, 1 << 49]), "a shape or parts that cannot be"),
    "absurd dimensions": (changed(shape=[1] * 100), "a shape or parts that cannot be"),
    "a negative shape": (changed(shape=[-4, -3]), "a shape or parts that cannot be"),
    "something more": (changed(code="x"), "does not say dtype, shape and parts"),
    "an object as a value": ({**GOOD, "values": {"a": {"b": 1}}}, "with a value that cannot be"),
    "an object in a value": ({**GOOD, "values": {"a": [[{}]]}}, "with a value that cannot be"),
    "not a number": (json.dumps({**GOOD, "values": {"a": float("nan")}}), "with a value that cannot be"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(tmp_path: Path, name: str) -> None:
    index, told = HOSTILE[name]
    with pytest.raises(BadIndex, match=told):
        read_index(write(tmp_path, index))
    with pytest.raises(ConfigError, match=f"run.resume=.*: its {INDEX} .*{told}"):
        metadata_of("run.resume", tmp_path)


def test_parts_are_apart_just_where_no_element_is_in_two_of_them() -> None:
    """Random boxes, beside a count of each element."""
    draw, found = random.Random(0), set()
    for _ in range(600):
        dimensions = draw.randint(1, 3)
        boxes = [
            ([draw.randint(0, 3) for _ in range(dimensions)], [draw.choice([0, 1, 1, 1, 2]) for _ in range(dimensions)])
            for _ in range(draw.randint(0, 4))
        ]
        counts = torch.zeros([6] * dimensions)
        for first, count in boxes:
            counts[tuple(slice(at, at + size) for at, size in zip(first, count, strict=True))] += 1
        assert are_apart(boxes) == bool(counts.max() <= 1), boxes
        spans = [(first[0], first[0] + count[0]) for first, count in boxes]
        line = torch.zeros(6)
        for begin, end in spans:
            line[begin:end] += 1
        assert spans_are_apart(spans) == bool(line.max() <= 1), spans
        found.add((dimensions, are_apart(boxes)))
    assert len(found) == 6
    assert are_apart([([], [])]) and not are_apart([([], []), ([], [])])


def test_an_index_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_index, "_LARGEST", 100)
    with pytest.raises(BadIndex, match="larger than an index of these files can be"):
        read_index(write(tmp_path, GOOD))


def test_an_index_of_far_more_bytes_than_its_files_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_index, "_SMALL", 100)
    size = (write(tmp_path, GOOD) / INDEX).stat().st_size
    (tmp_path / FILE).write_bytes(bytes(size // 16))
    with pytest.raises(BadIndex, match="larger than an index of these files can be"):
        read_index(tmp_path)
    (tmp_path / SECOND).write_bytes(bytes(1))
    assert read_index(tmp_path).state_dict_metadata.keys() >= {"model.w"}


def save_two_ranks(folder: Path) -> torch.Tensor:
    """The files of the good index, and the tensor in them."""
    whole = torch.arange(12, dtype=torch.float32).view(4, 3)
    first = [Planned("model.n", torch.int64, ()), Planned("model.w[0,0]", torch.float32, (3, 3))]
    second = [Planned("model.w[3,0]", torch.float32, (1, 3))]
    write_tensors(folder / FILE, first, [torch.tensor(7), whole[:3]])
    write_tensors(folder / SECOND, second, [whole[3:]])
    index = deepcopy(GOOD)
    index["tensors"]["model.n"]["parts"][0][1] = len(header_of(first))
    for i, begin in enumerate((len(header_of(first)) + 8, len(header_of(second)))):
        index["tensors"]["model.w"]["parts"][i][1] = begin
    write(folder, index)
    return whole


def test_parts_of_two_files_and_values_come_where_they_belong(tmp_path: Path) -> None:
    whole = save_two_ranks(tmp_path)
    assert read_header(tmp_path / SECOND).keys() == {"model.w[3,0]"}  # any reader of safetensors reads it
    state = {"model": {"w": torch.full((4, 3), -1.0), "n": torch.tensor(0)},
             "optimizer": {"lr": 0.0, "betas": (0.0, 0.0), "fused": True}}  # fmt: skip
    load_shards("o", tmp_path, metadata_of("o", tmp_path), state, alone=True)
    assert torch.equal(state["model"]["w"], whole) and state["model"]["n"] == 7
    assert state["optimizer"] == {"lr": 0.5, "betas": (0.9, 0.95), "fused": None}  # a tuple stays one


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", True), ("lr", "0.5"), ("lr", [0.5]), ("betas", 0.9), ("betas", [0.9]), ("betas", [0.9, "x"]), ("fused", 1)],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, name: str, value: object) -> None:
    """An option of the optimizer that would train otherwise, or end the run in its first step."""
    index = deepcopy(GOOD)
    index["values"] |= {"optimizer.lr": 1, f"optimizer.{name}": value}
    metadata = metadata_of("o", write(tmp_path, index))
    with pytest.raises(ConfigError, match=rf"o=.*cannot be read: ValueError: optimizer.{name} is .* there, and "):
        load_shards("o", tmp_path, metadata, {"optimizer": {"lr": 0.0, "betas": (0.0, 0.0), "fused": True}}, alone=True)


@pytest.mark.parametrize("spoil", ["cut", "missing", "empty"])
def test_a_file_that_is_not_as_the_index_says_is_a_line(tmp_path: Path, spoil: str) -> None:
    save_two_ranks(tmp_path)
    metadata = metadata_of("o", tmp_path)
    if spoil == "missing":
        (tmp_path / SECOND).unlink()
    else:
        (tmp_path / SECOND).write_bytes((tmp_path / SECOND).read_bytes()[: 80 if spoil == "cut" else 0])
    with pytest.raises(ConfigError, match="cannot be read: ") as refused:
        load_shards("o", tmp_path, metadata, {"model": {"w": torch.zeros(4, 3)}}, alone=True)
    assert "\n" not in str(refused.value)

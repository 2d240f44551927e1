"""Loading for a precision in one pass: the same weights, no more memory, nothing unusable let through."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkernels.int8_weights import int8_weight
from mmtrain.errors import ConfigError
from mmtrain.infer import memory
from mmtrain.infer.compute_dtype import cast_for_compute
from mmtrain.infer.load import load_weights, open_checkpoint
from mmtrain.infer.memory import weight_bytes
from mmtrain.infer.quantised import reader
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.infer.quantised.stream import served_model, stream_model
from tests.hf.folders import write
from tests.infer.chain import save_run
from tests.model.small import small_model

CPU = torch.device("cpu")
PRECISIONS = ["bf16", "int8", "int8-g128"]


SHAPE = dict(num_layers=3, layer_pattern="LS", hidden_size=160, vocab_size=264)


def model_of(shared: int) -> nn.Module:
    return small_model(**SHAPE, shared_ffn_hidden_size=shared)


@pytest.fixture(scope="module", params=["checkpoint", "hf", "minimax"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of ours or a Hugging Face folder, and the width of its shared experts."""
    folder, shared = tmp_path_factory.mktemp("served"), 0 if request.param == "hf" else 24  # transformers has none
    if request.param == "checkpoint":
        save_run(folder, model_of(shared))
        return folder, shared
    return write(model_of(shared), folder / "out", request.param), shared


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_weights_as_from_the_whole_model(precision: str, saved: tuple[Path, int]) -> None:
    path, shared = saved
    opened = open_checkpoint(path, "bytes")
    made, whole = load_weights(opened, CPU, precision), model_of(shared)
    if precision == "bf16":
        cast_for_compute(whole, torch.bfloat16)
    else:
        quantise_model(whole, precision == "int8-g128")
    wanted, found = whole.state_dict(), made.state_dict()
    assert found.keys() == wanted.keys() and not made.training
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    planned = served_model(opened.model, precision, CPU)
    assert weight_bytes(planned) == sum(value.nbytes for value in found.values())
    assert all(value.is_meta for value in planned.state_dict().values())


class TensorEvents(TorchDispatchMode):
    """Notes when operations make tensors, and when these are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # address of the storage, its bytes; -1 where a tensor of it is gone
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and not value.is_meta and id(value) not in self._known:
                self._known.add(id(value))
                storage = value.untyped_storage()
                self.events.append((storage.data_ptr(), storage.nbytes()))
                weakref.finalize(value, self._gone, id(value), storage.data_ptr())
        return made

    def _gone(self, number: int, address: int) -> None:
        self._known.discard(number)
        self.events.append((address, -1))

    def peak(self, but: Iterable[Tensor]) -> int:
        """The most bytes that storages had together, but for those of some tensors that are still there."""
        left_out = {value.untyped_storage().data_ptr() for value in but}
        tensors: Counter[int] = Counter()
        sizes: dict[int, int] = {}
        most = 0
        for address, count in self.events:
            if address in left_out:
                continue
            tensors[address] += 1 if count >= 0 else -1
            sizes[address] = max(count, sizes.get(address, 0))
            if not tensors[address]:
                del sizes[address]
            most = max(most, sum(sizes.values()))
        return most


def test_no_more_memory_than_the_served_model_and_the_largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(24)
    monkeypatch.setattr(int8_weight, "_ELEMENTS", 4096)
    alive: list[weakref.ref] = []
    sizes: list[int] = []

    def read(name: str, shape: Sequence[int]) -> Tensor:
        assert not any(ref() is not None for ref in alive), "a weight that was read before is still held"
        weight = model.get_parameter(name).detach().clone()
        alive.append(weakref.ref(weight))
        sizes.append(weight.nbytes)
        return weight

    with TensorEvents() as events:
        made = stream_model(model.config, read, "int8", CPU)
    scratch = 24 * 4096  # of rows that are quantised at a time: bytes of fp32 copies
    assert len(sizes) == len(list(model.parameters()))
    assert max(sizes) <= events.peak(but=[*made.state_dict().values(), *model.parameters()]) <= max(sizes) + scratch
    assert weight_bytes(made) + max(sizes) + scratch < 0.8 * weight_bytes(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    broken = small_model(num_layers=2, layer_pattern="LS", vocab_size=264)
    with torch.no_grad():
        broken.layers[1].ffn.experts.w2_EDF[2, 3, 4] = bad
    save_run(tmp_path, broken)
    for precision in PRECISIONS:
        with pytest.raises(ConfigError, match=r"not finite numbers \(layers.1.ffn.experts.w2_EDF\)"):
            load_weights(open_checkpoint(tmp_path, "bytes"), CPU, precision)


def test_a_checkpoint_that_lacks_a_weight(tmp_path: Path) -> None:
    broken = small_model(num_layers=2, layer_pattern="LS", vocab_size=264)
    del broken.layers[0].mixer.out_proj.weight
    save_run(tmp_path, broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights(open_checkpoint(tmp_path, "bytes"), CPU, "int8")


def test_room_is_asked_for_by_what_int8_takes(saved: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, model = open_checkpoint(saved[0], "bytes"), model_of(saved[1])
    needed = weight_bytes(served_model(opened.model, "int8", CPU))
    largest = max(4 * parameter.numel() for parameter in model.parameters())
    assert needed < 0.45 * weight_bytes(model)  # a third of it is the embedding and the head
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed + largest)
    load_weights(opened, CPU, "int8")
    for precision in ("int8-g128", "fp32"):
        with pytest.raises(ConfigError, match="the weights take"):
            load_weights(opened, CPU, precision)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed + largest - 1)
    monkeypatch.setattr(reader, "load_shards", lambda *args: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError, match="the weights take"):
        load_weights(opened, CPU, "int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_command_serves_it(precision: str, run: Path, main: Callable[[list[str]], int], capsys: object) -> None:
    args = [str(run), "--prompt", "n", "--greedy", "--quiet", "--precision", precision]
    assert main(args) == 0
    assert capsys.readouterr().out == "n\u00e9\u20ac\U0001f600!\n"

"""Served lightning layers with one product for both projections: the same tokens, logits and states, and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmtrain.infer import joined_projections
from mmtrain.infer.engine import Engine
from mmtrain.infer.joined_projections import end_to_end, join_projections, project_at_once
from mmtrain.infer.load import load_weights, open_checkpoint
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.lightning import LightningAttention, project_apart
from tests.infer.chain import save_run
from tests.infer.served import MODELS, SMALL, full_logits, request, seen_logits, state_of, text_of
from tests.model.small import draw, small_model

CPU = torch.device("cpu")
NAMES = ["hybrid with experts", "lightning", "pre-norm, shared expert"]
LENGTHS = (1, 9, 4, 17, 30)
BYTES = dict(num_layers=3, layer_pattern="LS", vocab_size=264)


def model_of(name: str = "hybrid with experts", joined: bool = True) -> nn.Module:
    model = small_model(**MODELS[name])
    if joined:
        join_projections(model)
    return model.eval()


def lightning_layers(model: nn.Module) -> list[LightningAttention]:
    found = [module for module in model.modules() if isinstance(module, LightningAttention)]
    assert found
    return found


def lie_together(mixer: LightningAttention) -> bool:
    return end_to_end(mixer.qkv_proj.weight, mixer.output_gate.weight) is not None


@contextmanager
def joined_products() -> Iterator[list[int]]:
    """Collects the numbers of tokens that go through a product of both weights."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def note(x_TD: Tensor, weight_ED: Tensor, *rest: object) -> Tensor:
        if weight_ED.shape[0] == 4 * 4 * 16:  # q, k, v and gate of all heads
            seen.append(x_TD.shape[0])
        return linear(x_TD, weight_ED, *rest)

    with mock.patch.object(torch.nn.functional, "linear", note):
        yield seen


@pytest.mark.parametrize("options", [SMALL, replace(SMALL, cuda_graphs=True), replace(SMALL, prefill_tokens=3)],
                         ids=["plain", "padded and mixed", "pieces"])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_tokens_logits_and_states_are_those_of_two_products(name: str, options: EngineOptions) -> None:
    tokens, logits, states, products = [], [], [], []
    for joined in (False, True):
        engine = Engine(model_of(name, joined), options=options)
        with seen_logits() as seen, joined_products() as at_once:
            made = engine.generate([request(text_of(length), 5 + length % 3) for length in LENGTHS])
        tokens.append([one.tokens for one in made])
        logits.append(dict(seen))
        products.append(at_once)
        numbers = [engine.submit(request(text_of(length), 30)) for length in (3, 8)]
        for _ in range(9):
            engine.step()
        states.append([state for number in numbers for state in state_of(engine, number)])
    assert products[0] == [] and len(products[1]) > 10
    assert tokens[0] == tokens[1] and logits[0].keys() == logits[1].keys()
    for row, logits_V in logits[0].items():
        torch.testing.assert_close(logits[1][row], logits_V, rtol=0, atol=1e-5)
    for apart, joined_state in zip(*states, strict=True):
        torch.testing.assert_close(joined_state, apart, rtol=1e-5, atol=1e-5)


def test_rows_of_many_tokens_have_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_projections, "MOST_TOKENS", 6)
    model, text = model_of("lightning"), text_of(20)
    engine = Engine(model, options=SMALL)
    with seen_logits() as seen, joined_products() as products:
        engine.generate([request(text, 4), request(text_of(6), 4)])
    assert products and max(products) <= 6
    for tokens, logits_V in seen.items():
        torch.testing.assert_close(logits_V, full_logits(model, tokens)[-1], rtol=0, atol=1e-5)


def test_state_dict_and_bytes_stay_and_weights_share_memory() -> None:
    model, before = model_of(joined=False), model_of(joined=False)
    join_projections(model)
    wanted, found = before.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and found[name].stride() == value.stride(), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    for mixer in lightning_layers(model):
        qkv, gate = mixer.qkv_proj.weight, mixer.output_gate.weight
        both = end_to_end(qkv, gate)
        assert both is not None and torch.equal(both, torch.cat([qkv, gate])) and both.data_ptr() == qkv.data_ptr()
        assert qkv.untyped_storage().nbytes() == qkv.nbytes + gate.nbytes  # no more than the two
        assert isinstance(qkv, nn.Parameter) and qkv.requires_grad
    joined = [end_to_end(m.qkv_proj.weight, m.output_gate.weight).data_ptr() for m in lightning_layers(model)]
    join_projections(model)  # once more does nothing
    assert joined == [m.qkv_proj.weight.data_ptr() for m in lightning_layers(model)]


def test_one_layer_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("lightning", joined=False)
    old = [[StorageWeakRef(m.qkv_proj.weight.untyped_storage()), StorageWeakRef(m.output_gate.weight.untyped_storage())]
           for m in lightning_layers(model)]  # fmt: skip
    cat, held = torch.cat, []

    def note(parts: list[Tensor]) -> Tensor:
        held.append([not one.expired() for layer in old for one in layer])
        return cat(parts)

    monkeypatch.setattr(torch, "cat", note)
    join_projections(model)
    assert held == [[True] * 4, [False, False, True, True]]
    assert all(one.expired() for layer in old for one in layer)


def test_training_is_not_joined() -> None:
    model = small_model()
    for mixer in lightning_layers(model):
        assert mixer.project is project_apart and not lie_together(mixer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_joins(precision: str, tmp_path: Path) -> None:
    save_run(tmp_path, small_model(**BYTES))
    model = load_weights(open_checkpoint(tmp_path, "bytes"), CPU, precision)
    wanted = small_model(**BYTES)
    for ours, theirs in zip(lightning_layers(model), lightning_layers(wanted), strict=True):
        assert ours.project is project_at_once and lie_together(ours)
        for name in ("qkv_proj", "output_gate"):
            exact = getattr(theirs, name).weight.to(ours.qkv_proj.weight.dtype)
            assert torch.equal(getattr(ours, name).weight, exact)


@pytest.mark.parametrize("precision", ["int8", "int8-g128"])
def test_int8_stays_as_it_is(precision: str, tmp_path: Path) -> None:
    save_run(tmp_path, small_model(**BYTES))
    model = load_weights(open_checkpoint(tmp_path, "bytes"), CPU, precision)
    assert all(mixer.project is project_apart for mixer in lightning_layers(model))


def parted(model: nn.Module) -> nn.Module:
    return model.double().float()


def reloaded(model: nn.Module) -> nn.Module:
    """The same memory with other values."""
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    return model


def assigned(model: nn.Module) -> nn.Module:
    """Other memory with other values."""
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)
    return model


def changed_copy(model: nn.Module) -> nn.Module:
    """A copy with other values, whose source stays as it was."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    return twin


def quantised(model: nn.Module) -> nn.Module:
    quantise_model(model)
    return model


@pytest.mark.parametrize(
    ("change", "together"),
    [(parted, False), (reloaded, True), (assigned, False), (changed_copy, False), (quantised, None)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_weights_that_are_moved_or_replaced_later_are_those_that_count(
    change: Callable[[nn.Module], nn.Module], together: bool | None
) -> None:
    changed, wanted = change(model_of("lightning")), change(model_of("lightning", joined=False))
    if together is not None:
        assert {lie_together(mixer) for mixer in lightning_layers(changed)} == {together}
    engine = Engine(changed, options=SMALL)
    with seen_logits() as seen:
        engine.generate([request(text_of(5), 6)])
    for tokens, logits_V in seen.items():
        torch.testing.assert_close(logits_V, full_logits(wanted, tokens)[-1], rtol=1e-5, atol=1e-5)
    if together is False:
        join_projections(changed)
        assert all(map(lie_together, lightning_layers(changed)))


def test_where_a_gradient_may_be_asked_for_both_weights_get_theirs() -> None:
    mixer = lightning_layers(model_of("lightning"))[0]
    given = mixer.qkv_proj, mixer.output_gate, draw(3, 48, dtype=torch.float32)
    for made in project_at_once(*given):
        made.sum().backward()
    assert mixer.qkv_proj.weight.grad is not None and mixer.output_gate.weight.grad is not None
    with torch.no_grad():
        apart = project_apart(*given)
        at_once = project_at_once(*given)
    assert [x.shape for x in at_once] == [x.shape for x in apart] and at_once[0].stride(0) == 256
    for ours, theirs in zip(at_once, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("second", ["other storage", "gap", "before", "other dtype", "other width", "columns"])
def test_matrices_that_are_not_end_to_end(second: str) -> None:
    memory = torch.zeros(40, 6)
    first, others = memory[10:20], {
        "other storage": torch.zeros(40, 6)[20:25], "gap": memory[21:25], "before": memory[5:10],
        "other dtype": memory[20:25].view(torch.int32), "other width": memory[20:26].view(12, 3),
        "columns": memory[20:, :3],
    }  # fmt: skip
    assert end_to_end(first, others[second]) is None
    found = end_to_end(first, memory[20:25])
    assert found is not None and found.shape == (15, 6) and found.data_ptr() == first.data_ptr()

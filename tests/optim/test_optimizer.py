"""Optimizers: which weights decay, clipping by a float64 norm, refusals, and DeepSpeed's host Adam against torch's."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mmtrain.config import OptimConfig
from mmtrain.errors import ConfigError
from mmtrain.optim.optimizer import build_optimizer, check_optimizer, set_lr, update
from mmtrain.optim.shard_adam import ShardAdam
from mmtrain.parallel.gradients import all_finite, clip_gradients
from tests.model.small import draw, small_model

SHAPES = {"matrix": (7, 33), "experts": (3, 5, 6), "norm": (17,), "other": (40, 2)}


class Weights(nn.Module):
    """Some parameters, one of them one-dimensional as norm weights are."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            setattr(self, name, nn.Parameter(draw(*shape, seed=i, dtype=torch.float32)))


def fill_gradients(module: nn.Module, step: int, skip: str | None = None) -> None:
    for i, (name, parameter) in enumerate(module.named_parameters()):
        grad = draw(*parameter.shape, seed=1000 * step + i, dtype=torch.float32)
        parameter.grad = None if name == skip else grad * 10.0 ** (i - 2)


def ids(group: dict) -> set[int]:
    return {id(parameter) for parameter in group["params"]}


def test_norm_weights_do_not_decay() -> None:
    model = small_model(num_layers=2, layer_pattern="LS", shared_ffn_hidden_size=16)
    decayed, plain = build_optimizer(model, OptimConfig(weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-7)).param_groups
    norms = {id(parameter) for name, parameter in model.named_parameters() if "norm" in name}
    assert ids(plain) == norms and len(norms) == 6
    assert ids(decayed) == {id(parameter) for parameter in model.parameters()} - norms
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    for group in (decayed, plain):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-7, 0.0)


def test_norm_weights_decay_when_asked() -> None:
    model = Weights()
    groups = build_optimizer(model, OptimConfig(decay_norms=True)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(4, 0.1)]


def reference_adamw(start: Tensor, grads: list[Tensor], lrs: list[float], decay: float) -> Tensor:
    """AdamW as Loshchilov and Hutter print it, in float64, with the paper's betas."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
        p = p - lr * (m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay * p)
    return p


def test_adamw_equals_its_formula_with_the_rate_that_is_set() -> None:
    model = Weights()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, seen, lrs = build_optimizer(model, OptimConfig()), [], [1e-2, 3e-3, 1e-3]
    for step, lr in enumerate(lrs):
        fill_gradients(model, step)
        seen.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        update(optimizer, lr, torch.tensor(False))
    for name, parameter in model.named_parameters():
        decay = 0.0 if name == "norm" else 0.1
        expected = reference_adamw(start[name], [grads[name] for grads in seen], lrs, decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


def exact_norm(module: nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in module.parameters() if p.grad is not None))


@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, 10.0])
def test_clipping_scales_to_the_norm_and_never_up(share: float) -> None:
    model = Weights()
    fill_gradients(model, 1, skip="other")
    before, norm = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, exact_norm(model)
    measured, _ = clip_gradients(model.parameters(), norm * share)
    assert measured.dtype == torch.float64 and measured.item() == pytest.approx(norm, rel=1e-12)
    assert model.other.grad is None
    for name, grad in before.items():
        expected = grad * min(share, 1.0)
        torch.testing.assert_close(getattr(model, name).grad, expected, rtol=2e-6, atol=0)
    assert exact_norm(model) == pytest.approx(norm * min(share, 1.0), rel=2e-6)


def test_without_a_limit_the_norm_is_only_measured() -> None:
    model = Weights()
    fill_gradients(model, 1)
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_gradients(model.parameters(), None)[0].item() == pytest.approx(exact_norm(model), rel=1e-12)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_the_norm_of_many_elements_is_summed_in_float64() -> None:
    big = nn.Parameter(torch.empty(3_000_000))
    big.grad = torch.full_like(big, 1e-3) + draw(3_000_000, dtype=torch.float32) * 1e-5
    exact = math.sqrt(big.grad.double().square().sum().item())
    assert clip_gradients([big], None)[0].item() == pytest.approx(exact, rel=1e-12)
    small = nn.Parameter(torch.empty(2))
    small.grad = torch.tensor([3e-30, 4e-30])  # squares that fp32 cannot hold
    assert clip_gradients([small], None)[0].item() == pytest.approx(5e-30, rel=1e-6)


def test_a_gradient_that_is_not_a_number_shows_in_the_norm() -> None:
    model = Weights()
    fill_gradients(model, 1)
    model.norm.grad[3] = float("nan")
    assert math.isnan(clip_gradients(model.parameters(), 1.0)[0].item())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_weight_that_is_not_finite_is_found(value: float) -> None:
    model = Weights()
    assert all_finite(model.parameters())
    model.norm.data[3] = value
    assert not all_finite(model.parameters())


def shard_adam(model: nn.Module) -> ShardAdam:
    """ShardAdam around an inner optimizer that is always there."""
    return shard_adam_of(list(model.parameters()))


def shard_adam_of(parameters: list[nn.Parameter]) -> ShardAdam:
    """ShardAdam around the same, over these parameters."""
    groups = [{"params": parameters, "weight_decay": 0.0}]
    return ShardAdam(groups, (0.9, 0.95), 1e-8, lambda inner: torch.optim.SGD(inner, lr=0.0))


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("build", [lambda model: build_optimizer(model, OptimConfig()), shard_adam])
def test_a_skipped_step_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(build: Callable) -> None:
    models = [Weights(), Weights()]
    optimizers = [build(model) for model in models]
    for step, bad in enumerate([False, True, True, False]):
        for model, optimizer in zip(models, optimizers, strict=True):
            skips = bad and model is models[0]
            if bad and not skips:
                continue
            fill_gradients(model, step)
            if skips:
                model.norm.grad[3] = float("nan")
            before = moments(optimizer)
            weights = [p.detach().clone() for p in model.parameters()]
            update(optimizer, 1e-2, torch.tensor(skips))
            assert all(p.grad is None for p in model.parameters())
            if skips:
                assert all(torch.equal(a, b) for a, b in zip(before, moments(optimizer), strict=True))
                assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_what_wants_no_gradient_is_left_out_and_nothing_may_be_left() -> None:
    """A rank of a pipeline whose layers are frozen has an optimizer all the same."""
    model = Weights()
    model.norm.requires_grad_(False)
    optimizer, before = build_optimizer(model, OptimConfig()), model.norm.detach().clone()
    assert all(one is not model.norm for group in optimizer.param_groups for one in group["params"])
    fill_gradients(model, 0)
    update(optimizer, 1e-2, torch.tensor(False))
    assert torch.equal(model.norm, before) and model.norm not in optimizer.state
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    for nothing in (build_optimizer(model, OptimConfig()), shard_adam_of([])):
        assert not any(group["params"] for group in nothing.param_groups)
        update(nothing, 1e-2, torch.tensor(False))
    assert clip_gradients(model.parameters(), 1.0)[0].item() == 0.0


def test_an_inner_optimizer_gets_rate_gradient_moments_and_the_steps_done() -> None:
    """SGD stands for the inner one; it knows nothing of moments, so what it was lent is looked at."""
    model = Weights()
    optimizer, start = shard_adam(model), [p.detach().clone() for p in model.parameters()]
    for done, lr in enumerate([1e-2, 3e-3]):
        fill_gradients(model, done)
        expected = [p - lr * p.grad for p in model.parameters()]
        update(optimizer, lr, torch.tensor(False))
        for parameter, value in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter, value)
            lent, mine = optimizer._inner.state[optimizer._local[parameter]], optimizer.state[parameter]
            assert lent["step"] == done and mine["step"].item() == done + 1
            assert all(lent[name].data_ptr() == mine[name].data_ptr() for name in ("exp_avg", "exp_avg_sq"))
        assert {group["step"] for group in optimizer._inner.param_groups} == {done}
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def refused(name: str, device: str = "cpu") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_optimizer(OptimConfig(name=name), device)
    assert caught.value.option == "optim.name" and caught.value.value == name
    assert "optim=adamw" in caught.value.fix and "\n" not in str(caught.value)
    return caught.value


def pretend_apex(monkeypatch: pytest.MonkeyPatch, **optimizers: object) -> None:
    """A package apex with a module apex.optimizers that holds these."""
    apex, inside = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.__path__, apex.optimizers = [], inside
    vars(inside).update(optimizers)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", inside)


def test_apex_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    assert "not installed" in refused("apex", "cuda").problem


def test_the_other_apex_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # PyPI's has no optimizers
    assert "not installed" in refused("apex", "cuda").problem
    pretend_apex(monkeypatch, Something=object)
    assert "not installed" in refused("apex", "cuda").problem


def test_apex_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_apex(monkeypatch, FusedAdam=object)
    assert "CUDA" in refused("apex", "cpu").problem
    check_optimizer(OptimConfig(name="apex"), "cuda")


def test_apex_is_given_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[dict], dict]] = []
    pretend_apex(monkeypatch, FusedAdam=lambda groups, **settings: calls.append((groups, settings)))
    build_optimizer(Weights(), OptimConfig(name="apex", beta1=0.8, eps=1e-7))
    ((groups, settings),) = calls
    assert settings == {"lr": 0.0, "betas": (0.8, 0.95), "eps": 1e-7, "adam_w_mode": True}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("installed", [False, True])
def test_host_adam_is_refused_without_deepspeed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    spec = importlib.machinery.ModuleSpec("deepspeed", None) if installed else None
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return spec if name == "deepspeed" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    if installed:
        check_optimizer(OptimConfig(name="cpu_offload"), "cpu")
    else:
        assert "pip install deepspeed ninja" in refused("cpu_offload").fix


def test_torch_adamw_is_always_there() -> None:
    for device in ("cpu", "cuda"):
        check_optimizer(OptimConfig(), device)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """DeepSpeed, which is in the extra `offload` and not in `test`; its first use compiles a C++ op for a minute."""
    module = pytest.importorskip("deepspeed")
    # The compiler driver calls `ninja` by name; it may be in the venv alone, which need not be on PATH. It comes last,
    # because ninjas of two versions build anew after each other.
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}")
    return module


def host_adam(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name="cpu_offload"))


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.slow
def test_host_adam_equals_torch() -> None:
    ours, theirs = Weights(), Weights()
    optimizers = host_adam(ours), build_optimizer(theirs, OptimConfig())
    for step, lr in enumerate([1e-2, 3e-3, 0.0, 1e-3, 2e-2]):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            fill_gradients(model, step, skip="other" if step == 1 else None)
            set_lr(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()
        for (name, mine), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6, msg=f"{name} after step {step}")
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {4.0, 5.0}


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.slow
def test_host_adam_continues_from_its_state() -> None:
    model = Weights()
    optimizer = host_adam(model)
    for step in range(5):
        if step == 2:
            resumed, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        fill_gradients(model, step)
        set_lr(optimizer, 1e-2)
        optimizer.step()
    second = host_adam(resumed)
    second.load_state_dict(state)
    assert second.state_dict().keys() == state.keys()
    for key, saved in state["state"].items():
        loaded = second.state_dict()["state"][key]
        assert loaded.keys() == saved.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    for step in range(2, 5):
        fill_gradients(resumed, step)
        set_lr(second, 1e-2)
        second.step()
    for mine, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.slow
def test_host_adam_takes_no_closure() -> None:
    with pytest.raises(NotImplementedError, match="closure"):
        host_adam(Weights()).step(lambda: 0.0)

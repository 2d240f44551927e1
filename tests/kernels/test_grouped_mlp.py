"""The experts' MLP against a float64 definition: result, all gradients, its parts by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.grouped_mlp import (
    eager,
    grouped_gate_up,
    grouped_mlp,
    grouped_mlp_forward,
    grouped_mlp_input_grad,
    grouped_weight_grad,
)
from mmkernels.grouped_mlp.naive import naive_grouped_mlp
from mmkernels.swiglu import swiglu
from tests.kernels.poison import fill_new_memory

EXPERTS, WIDTH, INNER, ROWS = 5, 32, 16, 40
ENDS = {
    "full": [8, 16, 24, 32, 40],
    "some rows unused": [3, 11, 20, 21, 29],
    "empty experts": [0, 17, 17, 30, 30],
    "no rows": [0, 0, 0, 0, 0],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(ends: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, w13 and w2; the result's gradient; and the offsets. Rows that belong to no expert are NaN."""
    x, dy = draw(ROWS, WIDTH, seed=1, dtype=dtype), draw(ROWS, WIDTH, seed=2, dtype=dtype)
    x[ends[-1] :] = dy[ends[-1] :] = torch.nan
    w13 = draw(EXPERTS, 2, INNER, WIDTH, seed=3, dtype=dtype) / WIDTH**0.5
    w2 = draw(EXPERTS, WIDTH, INNER, seed=4, dtype=dtype) / INNER**0.5
    return [x, w13, w2], dy, torch.tensor(ends, dtype=torch.int32)


def expected(inputs: list[Tensor], dy: Tensor, offset: Tensor) -> list[Tensor]:
    """Result and gradients of x, w13 and w2, in float64, of the used rows."""
    used = int(offset[-1])
    leaves = [x.double().requires_grad_() for x in (inputs[0][:used], *inputs[1:])]
    y = naive_grouped_mlp(*leaves, offset)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy[:used].double())]


def leave_nan_in_unused_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped product may leave anything in rows that belong to no expert: let it be NaN."""

    def grouped_mm(left: Tensor, right: Tensor, offset: Tensor) -> Tensor:
        out = F.grouped_mm(left, right, offs=offset)
        if right.ndim == 3:
            out[int(offset[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(eager, "grouped_mm", grouped_mm)
    fill_new_memory(monkeypatch)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    if not exact.numel():
        return found.shape == exact.shape
    return bool((found.double() - exact).abs().amax() <= TOLERANCE[dtype] * exact.abs().amax())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_result_and_gradients(ends: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, dy, offset = case(ends, dtype)
    exact = expected(inputs, dy, offset)
    leaves = [x.clone().requires_grad_() for x in inputs]
    leave_nan_in_unused_rows(monkeypatch)
    y = grouped_mlp(*leaves, offset)
    dx, *dweights = torch.autograd.grad(y, leaves, dy)
    assert y.shape == dx.shape == (ROWS, WIDTH) and y.dtype == dx.dtype == dtype
    used = ends[-1]
    for found, want in zip((y[:used], dx[:used], *dweights), exact, strict=True):
        assert close(found, want, dtype)
    empty = [e for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if begin == end]
    assert all(torch.count_nonzero(dw[empty]) == 0 for dw in dweights)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_the_parts_give_the_same_bits(ends: list[int], dtype: torch.dtype) -> None:
    inputs, dy, offset = case(ends, dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    whole = grouped_mlp(*leaves, offset)
    want = [whole.detach(), *torch.autograd.grad(whole, leaves, dy)]
    x, w13, w2 = inputs
    y, gate_up = grouped_mlp_forward(x, w13, w2, offset)
    assert torch.equal(grouped_gate_up(x, w13, offset)[: ends[-1]], gate_up[: ends[-1]])
    dx, dgate_up, hidden = grouped_mlp_input_grad(dy, gate_up, w13, w2, offset)
    dw13, dw2 = grouped_weight_grad(dgate_up, x, offset), grouped_weight_grad(dy, hidden, offset)
    used = ends[-1]
    for part, of_whole in zip((y[:used], dx[:used]), want[:2], strict=True):
        assert torch.equal(part, of_whole[:used])
    assert torch.equal(dw13.view_as(w13), want[2]) and torch.equal(dw2, want[3])


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_bits_of_products_that_autograd_differentiates(ends: list[int], dtype: torch.dtype) -> None:
    inputs, dy, offset = case(ends, dtype)
    results = []
    for mlp in (grouped_mlp, plain_products):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = mlp(*leaves, offset)
        dx, *dweights = torch.autograd.grad(y, leaves, dy)
        results.append([y[: ends[-1]], dx[: ends[-1]], *dweights])
    assert all(torch.equal(found, want) for found, want in zip(*results, strict=True))


def plain_products(x: Tensor, w13: Tensor, w2: Tensor, offset: Tensor) -> Tensor:
    gate_up = F.grouped_mm(x, w13.flatten(1, 2).transpose(1, 2), offs=offset)
    return F.grouped_mm(swiglu(gate_up, offset[-1:]), w2.transpose(1, 2), offs=offset)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)])
def test_a_frozen_input_gets_no_gradient_and_the_others_theirs(frozen: tuple[int, ...]) -> None:
    inputs, dy, offset = case(ENDS["some rows unused"], torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(grouped_mlp(*leaves, offset), leaves, dy)
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    grouped_mlp(*leaves, offset).backward(dy)
    used = int(offset[-1])
    for i, (leaf, grad) in enumerate(zip(leaves, want, strict=True)):
        rows = used if i == 0 else None
        assert leaf.grad is None if i in frozen else torch.equal(leaf.grad[:rows], grad[:rows])


@pytest.mark.parametrize("train_w13", [True, False])
def test_what_is_saved_for_backward(train_w13: bool) -> None:
    inputs, _, offset = case(ENDS["full"], torch.float32)
    leaves = [x.clone().requires_grad_(train_w13 or i != 1) for i, x in enumerate(inputs)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        grouped_mlp(*leaves, offset)
    weights = [x.data_ptr() for x in leaves[1:]]
    rows = sum(x.numel() for x in saved if x.data_ptr() not in weights and x.is_floating_point())
    assert rows == ROWS * (2 * INNER + WIDTH * train_w13)


def test_no_second_derivative() -> None:
    inputs, dy, offset = case(ENDS["full"], torch.float32)
    x = inputs[0].requires_grad_()
    (dx,) = torch.autograd.grad(grouped_mlp(*inputs, offset), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "argument", "allowed"),
    [
        ({"x_RD": torch.zeros(ROWS)}, "x_RD", "2 dimensions"),
        ({"x_RD": torch.zeros(ROWS, WIDTH, dtype=torch.int32)}, "x_RD", "torch.bfloat16"),
        ({"x_RD": torch.zeros(ROWS, WIDTH + 1)}, "w13_E2FD", f"[5, 2, 16, {WIDTH + 1}]"),
        ({"w13_E2FD": torch.zeros(EXPERTS, 2 * INNER, WIDTH)}, "w13_E2FD", "4 dimensions"),
        ({"w13_E2FD": torch.zeros(EXPERTS, 3, INNER, WIDTH)}, "w13_E2FD", "[5, 2, 16, 32]"),
        ({"w2_EDF": torch.zeros(EXPERTS, INNER, WIDTH)}, "w2_EDF", "[5, 32, 16]"),
        ({"w2_EDF": torch.zeros(EXPERTS, WIDTH, INNER).bfloat16()}, "w2_EDF", "torch.float32"),
        ({"offset_E": torch.zeros(EXPERTS, dtype=torch.int64)}, "offset_E", "torch.int32"),
        ({"offset_E": torch.zeros(EXPERTS + 1, dtype=torch.int32)}, "offset_E", "[5]"),
        ({"offset_E": torch.zeros(EXPERTS, dtype=torch.int32, device="meta")}, "offset_E", "cpu"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Tensor], argument: str, allowed: str) -> None:
    inputs, _, offset = case(ENDS["full"], torch.float32)
    arguments = dict(zip(("x_RD", "w13_E2FD", "w2_EDF"), inputs, strict=True), offset_E=offset) | change
    for call in (grouped_mlp, grouped_mlp_forward):
        with pytest.raises(KernelArgumentError) as caught:
            call(**arguments)
        assert caught.value.argument == argument and allowed in str(caught.value)
    arguments.pop("w2_EDF")
    if "w2_EDF" not in change:
        with pytest.raises(KernelArgumentError) as caught:
            grouped_gate_up(**arguments)
        assert caught.value.argument == argument


def test_gradients_that_do_not_fit() -> None:
    (x, w13, w2), dy, offset = case(ENDS["full"], torch.float32)
    _, gate_up = grouped_mlp_forward(x, w13, w2, offset)
    with pytest.raises(KernelArgumentError, match=r"dy_RD.*\[40, 32\]"):
        grouped_mlp_input_grad(dy[:-1], gate_up, w13, w2, offset)
    with pytest.raises(KernelArgumentError, match=r"gate_up_R2F.*\[40, 32\]"):
        grouped_mlp_input_grad(dy, gate_up[:, 1:], w13, w2, offset)
    with pytest.raises(KernelArgumentError, match=r"in_RM.*float32"):
        grouped_weight_grad(dy, x.bfloat16(), offset)
    with pytest.raises(KernelArgumentError, match=r"in_RM.*\[40, 32\]"):
        grouped_weight_grad(dy, x[1:], offset)

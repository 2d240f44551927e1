"""Weights whose gradients are added to sums where they are made, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmtrain.model.ffn import whole_feed_forward
from mmtrain.model.gradient_sum import project, whole_gradient
from mmtrain.model.linear import Linear
from mmtrain.model.loss import linear_cross_entropy
from tests.model.small import draw

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def weights(dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same weights twice, the second ones with sums that hold ones already."""
    plain = [nn.Parameter(draw(*shape, seed=i, dtype=torch.float64).to(dtype)) for i, shape in enumerate(shapes)]
    summed = [nn.Parameter(weight.detach().clone()) for weight in plain]
    for weight in summed:
        weight.gradient_sum = torch.ones_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    return plain, summed


def assert_added(summed: nn.Parameter, gradient: Tensor, times: int = 1) -> None:
    assert summed.grad is None
    added = (summed.gradient_sum - 1).double()
    assert (added - times * gradient.double()).norm() <= BOUND[summed.dtype] * times * gradient.double().norm()


@pytest.mark.parametrize("dtype", BOUND)
def test_a_feed_forward_adds_both_gradients_to_their_sums(dtype: torch.dtype) -> None:
    plain, summed = weights(dtype, (2, 12, 8), (8, 12))
    x, dy = (draw(20, 8, seed=9 + i, dtype=torch.float64).to(dtype) for i in range(2))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [whole_feed_forward(leaf, *some) for leaf, some in zip(leaves, (plain, summed), strict=True)]
    assert torch.equal(*outputs)
    outputs[0].backward(dy)
    outputs[1].backward(dy)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    for weight, other in zip(plain, summed, strict=True):
        assert_added(other, weight.grad)
    whole_feed_forward(leaves[1], *summed).backward(dy)
    for weight, other in zip(plain, summed, strict=True):
        assert_added(other, weight.grad, times=2)


def test_products_without_autograd_add_nothing() -> None:
    _, (weight,) = weights(torch.float32, (6, 4))
    with torch.no_grad():
        project(draw(3, 4, dtype=torch.float32), weight)
    assert torch.equal(weight.gradient_sum, torch.ones(6, 4))


def test_some_rows_of_a_weight_have_a_gradient_of_their_own() -> None:
    layer = Linear(4, 6)
    nn.init.normal_(layer.weight)
    layer.weight.gradient_sum = torch.zeros(6, 4)
    layer(draw(3, 4, dtype=torch.float32), slice(2, 5)).sum().backward()
    assert layer.weight.grad[2:5].abs().sum() > 0 and not layer.weight.gradient_sum.any()


@pytest.mark.parametrize("dtype", BOUND)
def test_the_head_s_sum_is_whole_when_its_factor_is_known(dtype: torch.dtype) -> None:
    """Of two micro-batches, with a factor that only backward brings."""
    (plain,), (summed,) = weights(dtype, (30, 8))
    summed.gradient_sum.zero_()
    factor = 0.375
    for seed in range(2):
        x = draw(20, 8, seed=5 + seed, dtype=torch.float64).to(dtype)
        labels = torch.arange(20).where(torch.arange(20) % 3 > 0, -100)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for leaf, weight in zip(leaves, (plain, summed), strict=True):
            (linear_cross_entropy(leaf, weight, labels, 7) * factor).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    found = whole_gradient(summed)
    assert summed.grad is None and found is summed.gradient_sum
    assert (found.double() - plain.grad.double()).norm() <= BOUND[dtype] * plain.grad.double().norm()


def test_a_loss_without_gradients_leaves_the_head_s_sum_alone() -> None:
    _, (weight,) = weights(torch.float32, (30, 8))
    with torch.no_grad():
        linear_cross_entropy(draw(20, 8, dtype=torch.float32), weight, torch.arange(20), 7)
    assert torch.equal(weight.gradient_sum, torch.ones(30, 8))

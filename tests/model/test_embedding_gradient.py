"""The gradient of a table with a sum of its gradients, against autograd's own and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.model.embedding import Embedding
from tests.model.small import draw, draw_tokens, relative

V, D = 40, 24


def make(dtype: torch.dtype, total: Tensor | None) -> Embedding:
    """A table of this type, with a sum of its gradients or without."""
    embedding = Embedding(V, D)
    embedding.weight = torch.nn.Parameter(draw(V, D, seed=1, dtype=dtype))
    if total is not None:
        embedding.weight.gradient_sum = total
    return embedding


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Tokens and upstream gradients of some micro-batches; most tokens come many times."""
    return [(draw_tokens(301, seed, V) // 2, draw(301, D, seed=seed, dtype=dtype)) for seed in range(2, 5)]


def exact(before: Tensor, dtype: torch.dtype) -> Tensor:
    sums = before.double()
    for tokens, dy in batches(dtype):
        sums = sums.index_add(0, tokens, dy.double())
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_takes_the_gradient(dtype: torch.dtype) -> None:
    before = draw(V, D, seed=9, dtype=torch.float32)
    total, autograds = before.clone(), before.clone()
    ours, theirs = make(dtype, total), make(dtype, None)
    for tokens, dy in batches(dtype):
        out = ours(tokens)
        assert out.requires_grad and torch.equal(out, F.embedding(tokens, ours.weight))
        out.backward(dy)
        theirs(tokens).backward(dy)
        autograds += theirs.weight.grad
        theirs.weight.grad = None
    assert ours.weight.grad is None and total is ours.weight.gradient_sum
    want = exact(before, dtype)
    if dtype == torch.float32:
        assert relative(total, autograds) < 1e-6
    else:
        assert relative(total, want) < 1e-6 < 1e-4 < relative(autograds, want)
    unused = torch.ones(V, dtype=torch.bool).index_fill_(0, torch.cat([tokens for tokens, _ in batches(dtype)]), False)
    assert unused.sum() >= V // 2 and torch.equal(total[unused], before[unused])


def test_the_gradient_of_a_sum_of_outputs() -> None:
    """It is one number, expanded."""
    total, tokens = torch.zeros(V, D), draw_tokens(50, 1, V)
    make(torch.bfloat16, total)(tokens).sum().backward()
    assert torch.equal(total, tokens.bincount(minlength=V)[:, None].expand(V, D).float())


def test_no_tokens() -> None:
    total = draw(V, D, dtype=torch.float32)
    kept = total.clone()
    out = make(torch.bfloat16, total)(torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, D) and out.requires_grad
    out.sum().backward()
    assert torch.equal(total, kept)


def test_without_gradients_nothing_is_added() -> None:
    total = torch.zeros(V, D)
    embedding, tokens = make(torch.float32, total), draw_tokens(5, 1, V)
    with torch.no_grad():
        assert not embedding(tokens).requires_grad
    embedding.weight.requires_grad_(False)
    assert not embedding(tokens).requires_grad
    assert not total.any()

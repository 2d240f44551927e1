"""The experts' products in chunks of rows against one expert at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.grouped_mlp import grouped_mlp
from mmkernels.grouped_mlp.naive import naive_grouped_mlp
from mmtrain.model.moe.expert_chunks import experts_in_chunks
from tests.model.small import draw, relative

HIDDEN, WIDTH = 16, 24


def operands(counts: list[int], unused: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows and weights, ends of experts, and an upstream; rows that belong to no expert are NaN."""
    rows, experts = sum(counts) + unused, len(counts)
    shapes = (rows, HIDDEN), (experts, 2, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)
    given = [draw(*shape, seed=i, dtype=dtype) / (1 if i == 0 else 4) for i, shape in enumerate(shapes)]
    upstream = draw(rows, HIDDEN, seed=9, dtype=dtype)
    given[0][sum(counts) :] = upstream[sum(counts) :] = torch.nan
    return given, torch.tensor(counts).cumsum(0).int(), upstream


def results(call, given: list[Tensor], upstream: Tensor, used: int) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = call(*leaves)
    out.backward(upstream)
    return [out.detach()[:used], leaves[0].grad[:used], *(leaf.grad for leaf in leaves[1:])]


@pytest.mark.parametrize("counts", [[5, 0, 13, 3], [0, 0], [1, 20]], ids=str)
@pytest.mark.parametrize("unused", [0, 9])
@pytest.mark.parametrize("chunk", [1, 7, 21, 1000])
def test_chunks_equal_an_expert_at_a_time(counts: list[int], unused: int, chunk: int) -> None:
    given, offset_E, upstream = operands(counts, unused)
    used = sum(counts)
    found = results(lambda *three: experts_in_chunks(*three, offset_E, chunk), given, upstream, used)
    exact = [tensor.double() for tensor in given]
    exact[0], upstream = exact[0][:used], upstream.double()[:used]
    for ours, theirs in zip(
        found, results(lambda *three: naive_grouped_mlp(*three, offset_E), exact, upstream, used), strict=True
    ):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_is_the_whole_product_to_the_bit(dtype: torch.dtype) -> None:
    given, offset_E, upstream = operands([5, 0, 13, 3], 4, dtype)
    found = results(lambda *three: experts_in_chunks(*three, offset_E, 25), given, upstream, 21)
    for ours, theirs in zip(
        found, results(lambda *three: grouped_mlp(*three, offset_E), given, upstream, 21), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_sums_over_chunks_are_not_rounded_to_bf16_each_time() -> None:
    """Of an expert with rows in 64 chunks: rounded parts alone are about as far off as one rounded product."""
    given, offset_E, upstream = operands([512, 512], 0, torch.bfloat16)
    exact = results(lambda *three: naive_grouped_mlp(*three, offset_E), [t.double() for t in given],
                    upstream.double(), 1024)  # fmt: skip
    whole = results(lambda *three: grouped_mlp(*three, offset_E), given, upstream, 1024)
    found = results(lambda *three: experts_in_chunks(*three, offset_E, 16), given, upstream, 1024)
    for ours, theirs, right in zip(found, whole, exact, strict=True):
        assert relative(ours, right) <= 1.5 * relative(theirs, right)

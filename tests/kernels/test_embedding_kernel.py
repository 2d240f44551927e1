"""The gradient of an embedding, added to a sum, against float64 in both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.embedding import add_embedding_grad, launch
from mmkernels.embedding.naive import naive_add_embedding_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = launch.BLOCK_T
GUARD = 3
"""Rows on either side of the sum that nothing may write, and of NaN beside the gradients that nothing may read."""
UNTOUCHED = 7.0


def make(tokens: Tensor, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A sum that is not zero, tokens and gradients, sum and gradients with guards."""
    generator = torch.Generator().manual_seed(len(tokens) * 100 + width)
    total = torch.full((vocabulary + 2 * GUARD, width), UNTOUCHED)
    total[GUARD:-GUARD] = torch.randn(vocabulary, width, generator=generator)
    dy = torch.full((len(tokens) + 2 * GUARD, width + GUARD), float("nan"), dtype=dtype)
    dy[GUARD:-GUARD, :width] = torch.randn(len(tokens), width, generator=generator)
    return [total.to(DEVICE)[GUARD:-GUARD], tokens.to(DEVICE), dy.to(DEVICE)[GUARD:-GUARD, :width]]


def drawn(count: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(count))


def guards(total: Tensor) -> Tensor:
    """The rows before and after a sum of `make`."""
    rows, width = total.shape
    around = total.as_strided((rows + 2 * GUARD, width), (width, 1), total.storage_offset() - GUARD * width)
    return torch.cat([around[:GUARD], around[-GUARD:]])


def assert_right(total: Tensor, tokens: Tensor, dy: Tensor, backend: str) -> None:
    """Right within the rounding of fp32, of which a chain of additions has one for each; nothing else is touched."""
    before = total.clone()
    want = naive_add_embedding_grad(before, tokens, dy)
    got = add_embedding_grad(total, tokens, dy, backend=backend)
    assert got is total
    own = (tokens >= 0) & (tokens < len(total))
    size = naive_add_embedding_grad(before.abs(), tokens, dy.abs())
    most = int(tokens[own].bincount().max()) if own.any() else 0
    assert ((got.double() - want).abs() <= 2**-24 * (1 + most) * size).all()
    named = torch.zeros(len(total), dtype=torch.bool, device=DEVICE).index_fill_(0, tokens[own], True)
    assert torch.equal(got[~named].view(torch.int32), before[~named].view(torch.int32))
    assert (guards(total) == UNTOUCHED).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "vocabulary", "width"), [(1, 1, 1), (37, 11, 96), (65, 200, 128), (33, 5, 300), (130, 3, 7)]
)
def test_rows_are_added(count: int, vocabulary: int, width: int, dtype: torch.dtype, backend: str) -> None:
    assert_right(*make(drawn(count, vocabulary), vocabulary, width, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_runs_across_block_edges(run: int, backend: str) -> None:
    """Whole numbers, whose sums are exact: a row that is lost or added twice shows."""
    tokens = torch.tensor([2] * 5 + [4] * run + [5] + [7] * run)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(run))]
    total, tokens, dy = make(tokens, 9, 20)
    total.round_()
    dy.copy_(torch.arange(len(tokens), device=DEVICE)[:, None] + 1)
    want = naive_add_embedding_grad(total, tokens, dy)
    assert torch.equal(add_embedding_grad(total, tokens, dy, backend=backend).double(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token_for_all(dtype: torch.dtype, backend: str) -> None:
    assert_right(*make(torch.full((3000,), 6), 8, 40, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", [[-1, 9], [-3, 10, -3], [-(2**40), 2**40, 2**32 + 3, -(2**63), 2**63 - 1]])
def test_tokens_that_are_no_row_add_nothing(outside: list[int], backend: str) -> None:
    total, tokens, dy = make(torch.tensor([*outside, 3, 8, 3, *outside, 8]), 9, 20)
    dy[(tokens < 0) | (tokens > 8)] = float("nan")
    total[0] = -0.0  # even the sign of a zero stays
    assert_right(total, tokens, dy, backend)
    assert_right(*make(torch.tensor(outside), 9, 20), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("count", "vocabulary", "width"), [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)])
def test_nothing_to_do(count: int, vocabulary: int, width: int, backend: str) -> None:
    tokens, dy = torch.zeros(count, dtype=torch.int64, device=DEVICE), torch.ones(count, width, device=DEVICE)
    total = torch.randn(vocabulary, width, device=DEVICE)
    kept = total.clone()
    assert torch.equal(add_embedding_grad(total, tokens, dy, backend=backend), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend: str) -> None:
    total, tokens, dy = make(drawn(2 * 37, 11).repeat_interleave(2), 11, 24)
    dense = dy.contiguous()
    for view in (dense.t().contiguous().t(), dense[:1, :1].expand(dense.shape), dense[:, :1].expand(dense.shape)):
        assert_right(total, tokens, view, backend)
    assert_right(total, tokens[::2], dense[::2], backend)
    assert_right(total, tokens[:1].expand(len(dense)), dense, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    total, tokens, dy = make(drawn(300, 4), 6, 50)
    other = total.clone()
    add_embedding_grad(other, tokens, dy, backend=backend)
    assert torch.equal(add_embedding_grad(total, tokens, dy, backend=backend), other)


def test_inputs_are_left_alone_and_no_graph_is_made() -> None:
    total, tokens, dy = make(drawn(37, 11), 11, 24)
    kept = tokens.clone(), dy.clone()
    add_embedding_grad(total, tokens, dy.requires_grad_())
    assert not total.requires_grad
    assert torch.equal(tokens, kept[0]) and torch.equal(dy.detach(), kept[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_float64_sum_is_torchs(dtype: torch.dtype) -> None:
    total, tokens, dy = make(drawn(37, 5), 5, 24, dtype)
    total = total.double()
    want = naive_add_embedding_grad(total, tokens, dy)
    torch.testing.assert_close(add_embedding_grad(total, tokens, dy), want, rtol=1e-13, atol=1e-13)


def test_bad_arguments() -> None:
    total, tokens, dy = make(drawn(5, 4), 4, 8)
    bad: list[tuple[str, str, dict[str, Any]]] = [
        ("total_VD", "a tensor", {"total_VD": None}),
        ("total_VD", "2 dimensions", {"total_VD": total[0]}),
        ("total_VD", "torch.float32 or torch.float64", {"total_VD": total.bfloat16()}),
        ("total_VD", "contiguous", {"total_VD": total.t().contiguous().t()}),
        ("total_VD", "without gradient", {"total_VD": total.clone().requires_grad_()}),
        ("tokens_T", "torch.int64", {"tokens_T": tokens.int()}),
        ("tokens_T", "1 dimensions", {"tokens_T": tokens[None]}),
        ("tokens_T", "the device of total_VD", {"tokens_T": tokens.to("meta")}),
        ("dy_TD", "torch.float32 or", {"dy_TD": dy.double()}),
        ("dy_TD", r"\[5, 8\]", {"dy_TD": dy[:4]}),
        ("dy_TD", r"\[5, 8\]", {"dy_TD": dy[:, :4]}),
        ("dy_TD", "the device of total_VD", {"dy_TD": dy.to("meta")}),
        ("backend", "auto, triton, torch", {"backend": "cuda"}),
        ("total_VD", "with backend='triton'", {"total_VD": total.double(), "backend": "triton"}),
    ]
    good = {"total_VD": total, "tokens_T": tokens, "dy_TD": dy}
    for name, allowed, change in bad:
        with pytest.raises(KernelArgumentError, match=allowed) as caught:
            add_embedding_grad(**(good | change))
        assert str(caught.value).startswith(f"{name}: got ") and "\n" not in str(caught.value)


def frequent(count: int, vocabulary: int) -> Tensor:
    """Tokens of which some come thousands of times and most not at all."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return (vocabulary**uniform - 1).long()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("count", "vocabulary", "width"), [(16384, 200_064, 2048), (8191, 1000, 1000)])
def test_big_shapes(count: int, vocabulary: int, width: int, dtype: torch.dtype, backend: str) -> None:
    total, tokens, dy = make(frequent(count, vocabulary), vocabulary, width, dtype)
    other = total.clone()
    assert_right(total, tokens, dy, backend)
    assert torch.equal(add_embedding_grad(other, tokens, dy, backend=backend), total)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last rows of a table and of gradients of more than 2^31 elements."""
    width, count = 4096, 2**19 + 7
    total = torch.zeros(count, width, device=DEVICE)
    tokens = torch.arange(count, device=DEVICE).flip(0)
    dy = torch.ones(count, width, device=DEVICE, dtype=torch.bfloat16)
    dy[-1], dy[0] = 2, 3
    add_embedding_grad(total, tokens, dy)
    assert (total[0] == 2).all() and (total[-1] == 3).all() and (total[1:-1] == 1).all()


@pytest.mark.gpu
def test_no_wait_and_a_graph() -> None:
    total, tokens, dy = make(frequent(4096, 1000), 1000, 256, torch.bfloat16)
    once = add_embedding_grad(total.clone(), tokens, dy)
    twice = add_embedding_grad(once.clone(), tokens.flip(0), dy)
    into, memory = total.clone(), tokens.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_embedding_grad(into, memory, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(into, once)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_embedding_grad(into, memory, dy)
    memory.copy_(tokens.flip(0))
    graph.replay()
    assert torch.equal(into, twice)

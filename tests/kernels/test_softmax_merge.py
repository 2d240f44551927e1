"""Results of several blocks of keys joined, and the packed row's part of gradients, against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax import (
    merge,
    merge_launch,
    softmax_attention_with_lse,
    softmax_backward,
    softmax_forward,
    softmax_merge,
    softmax_packed_backward,
)
from mmkernels.softmax.naive import naive_softmax_block
from tests.kernels.poison import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
# Triton's interpreter cuts bfloat16 off where the compiler rounds.
BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, merge, merge_launch)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def results(
    tokens: int, heads: int, width: int, dtype: torch.dtype, part_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """o, lse, part and its lse; log-sum-exps far apart and far from 0, and some of -inf."""
    wide = torch.promote_types(dtype, torch.float32)
    o, part = (
        draw(tokens, heads, width, seed=1, dtype=dtype),
        draw(tokens, heads, width, seed=2, dtype=part_dtype or dtype),
    )
    lse, part_lse = (draw(heads, tokens, seed=seed, dtype=wide) * 30 + 200 for seed in (3, 4))
    lse[:, ::5], part_lse[:, ::3] = -torch.inf, -torch.inf
    o[::5], part[::3] = 0, 0
    return [o, lse, part, part_lse]


def expected(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    lse, part_lse = lse.double(), part_lse.double()
    weight = torch.nan_to_num(torch.sigmoid(lse - part_lse), nan=0.0).T[..., None]  # both -inf: both outputs are 0
    return weight * o.double() + (1 - weight) * part.double(), torch.logaddexp(lse, part_lse)


def assert_right(given: list[Tensor], backend: str, bound: float) -> None:
    o, lse, part, part_lse = given
    want_o, want_lse = expected(*given)
    size, _ = expected(o.abs(), lse, part.abs(), part_lse)  # the sum's terms may cancel
    kept = part.clone(), part_lse.clone()
    softmax_merge(o, lse, part, part_lse, backend=backend)
    assert torch.isfinite(o).all() and ((o.double() - want_o).abs() <= bound * (1e-3 + size)).all()
    assert torch.equal(lse.isinf(), want_lse.isinf()) and torch.allclose(lse.double(), want_lse, rtol=1e-6)
    assert torch.equal(part, kept[0]) and torch.equal(part_lse, kept[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 1), (33, 3, 16), (17, 2, 20), (300, 1, 128)])
def test_merge(tokens: int, heads: int, width: int, dtype: torch.dtype, backend: str) -> None:
    assert_right(results(tokens, heads, width, dtype), backend, BOUND[dtype])


def test_merge_in_float64() -> None:
    assert_right(results(33, 3, 16, torch.float64), "auto", BOUND[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_output_takes_16_bit_parts(backend: str) -> None:
    assert_right(results(33, 3, 16, torch.float32, torch.bfloat16), backend, BOUND[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_heads_of_larger_tensors_and_nothing_else(backend: str) -> None:
    o, lse, part, part_lse = results(40, 6, 16, torch.float32)
    part_lse = part_lse.T.contiguous().T
    before = o.clone(), lse.clone()
    rows, heads = slice(7, 29), slice(2, 5)
    assert_right([o[rows, heads], lse[heads, rows], part[rows, heads], part_lse[heads, rows]], backend, 1e-6)
    for now, then, span in ((o, before[0], (rows, heads)), (lse, before[1], (heads, rows))):
        assert not torch.equal(now[span], then[span])
        now[span] = then[span]
        assert torch.equal(now, then)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_merge(backend: str) -> None:
    softmax_merge(*results(0, 3, 16, torch.float32), backend=backend)


def test_blocks_of_keys_in_any_order_equal_all_keys_together() -> None:
    q, k, v = draw(9, 4, 8, seed=1), draw(30, 2, 8, seed=2), draw(30, 2, 8, seed=3)
    want_o, want_lse = naive_softmax_block(q, k, v, False, 8**-0.5)
    o, lse = torch.zeros_like(q), torch.full_like(want_lse, -torch.inf)
    for keys in (slice(20, 30), slice(0, 0), slice(0, 1), slice(1, 20)):
        softmax_merge(o, lse, *softmax_forward(q, k[keys], v[keys], False))
    assert torch.allclose(o, want_o, atol=1e-13) and torch.allclose(lse, want_lse, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [[5, 0, 12, 1], [18], [0, 18, 0]], ids=str)
def test_packed_backward_is_the_part_of_the_rows_keys(lengths: list[int], dtype: torch.dtype) -> None:
    """All queries of the row see seven more keys, which come first."""
    q, do = (draw(18, 4, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    k, v, far_k, far_v = (draw(n, 2, 8, seed=seed, dtype=dtype) for n, seed in ((18, 3), (18, 4), (7, 5), (7, 6)))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE)
    o, lse = softmax_attention_with_lse(q, k, v, cu, lengths)
    softmax_merge(o, lse, *softmax_forward(q, far_k, far_v, False))
    got = [*softmax_packed_backward(do, q, k, v, o, lse, cu, lengths)]
    dq, *far = softmax_backward(do, q, far_k, far_v, o, lse, False)
    got[0] = got[0] + dq
    leaves = [x.double().requires_grad_() for x in (q, k, v, far_k, far_v)]
    whole, start = [], 0
    for n in lengths:
        rows = slice(start, start := start + n)
        keys, values = (torch.cat([leaves[i + 2], leaves[i][rows]]) for i in (1, 2))
        score = torch.einsum("thd,shd->hts", leaves[0][rows], keys.repeat_interleave(2, 1)) * 8**-0.5
        score = score.masked_fill(torch.ones(n, 7 + n, device=DEVICE).triu(8).bool(), -torch.inf)
        whole.append(torch.einsum("hts,shd->thd", score.softmax(-1), values.repeat_interleave(2, 1)))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert (o.double() - torch.cat(whole)).abs().max() < bound
    for mine, other in zip((*got, *far), torch.autograd.grad(torch.cat(whole), leaves, do.double()), strict=True):
        assert mine.dtype == dtype and (mine.double() - other).abs().max() < bound


def test_packed_backward_of_a_row_without_tokens() -> None:
    q, k, lse = draw(0, 4, 8, seed=1), draw(0, 2, 8, seed=1), draw(4, 0, seed=1)
    grads = softmax_packed_backward(q, q, k, k, q, lse, torch.tensor([0, 0], device=DEVICE), [0])
    assert [list(x.shape) for x in grads] == [[0, 4, 8], [0, 2, 8], [0, 2, 8]]


def test_bad_arguments() -> None:
    o, lse, part, part_lse = results(6, 4, 8, torch.float32)
    good: dict[str, Any] = dict(o_THD=o, lse_HT=lse, part_THD=part, part_lse_HT=part_lse)
    for name, allowed, change in [
        ("o_THD", "3 dimensions", {"o_THD": o[0]}),
        ("o_THD", "stride 1", {"o_THD": o.mT}),
        ("o_THD", "outside autograd", {"o_THD": o.clone().requires_grad_()}),
        ("part_THD", r"\[6, 4, 8\]", {"part_THD": part[:5]}),
        ("part_THD", "the device of o_THD", {"part_THD": part.to("meta")}),
        ("lse_HT", r"\[4, 6\]", {"lse_HT": lse.T}),
        ("lse_HT", "float64", {"o_THD": o.double()}),
        ("part_lse_HT", "float32", {"part_lse_HT": part_lse.double()}),
        ("backend", "auto, triton, torch", {"backend": "cuda"}),
    ]:
        with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}"):
            softmax_merge(**(good | change))
    q, k = part, torch.zeros(6, 2, 8, device=DEVICE)
    cu = torch.tensor([0, 6], device=DEVICE)
    with pytest.raises(KernelArgumentError, match=r"^lse_HT: got "):
        softmax_packed_backward(q, q, k, k, q, lse.T, cu, [6])
    with pytest.raises(KernelArgumentError, match=r"^lengths: got "):
        softmax_packed_backward(q, q, k, k, q, lse, cu, [5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(8192, 64, 128), (8191, 8, 128), (999, 12, 96)])
def test_big_shapes(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    assert_right(results(tokens, heads, width, dtype), "triton", BOUND[dtype])

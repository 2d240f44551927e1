"""Attention of the last tokens of documents, against the last rows of each document's whole attention in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax import Suffixes, softmax_suffix_backward, softmax_suffix_forward, suffixes
from mmkernels.softmax.backends import flash
from mmkernels.softmax.naive import naive_softmax_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUERIES, KEYS = (3, 40, 1, 1, 96), (3, 57, 9, 1, 97)
BOUND = {torch.float64: 1e-12, torch.bfloat16: 2e-2}


def documents(queries: tuple[int, ...] = QUERIES, keys: tuple[int, ...] = KEYS) -> Suffixes:
    offsets = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in (queries, keys)]
    return Suffixes(queries, keys, *offsets)


def draw(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as a projection and a buffer of keys and values give them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    q, kv, do = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for shape in ((sum(QUERIES), 6, 16), (sum(KEYS), 2, 2, 16), (sum(QUERIES), 4, 16))
    )
    return [q[:, :4], kv[:, 0], kv[:, 1], do]


def wanted(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients; a document's first tokens get queries of zero, whose results are left out."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found, begin = [], 0
    for (low, high), (first, stop) in zip(*(pairwise(x.tolist()) for x in offsets()), strict=True):
        queries = torch.cat([leaves[0].new_zeros(stop - first - (high - low), 4, 16), leaves[0][low:high]])
        o, lse = naive_softmax_block(queries, leaves[1][first:stop], leaves[2][first:stop], True, 0.25)
        found.append((o[low - high :], lse[:, low - high :]))
        begin = high
    assert begin == len(q)
    o, lse = torch.cat([o for o, _ in found]), torch.cat([lse for _, lse in found], dim=1)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do.double())]


def offsets() -> tuple[Tensor, Tensor]:
    return documents().cu_queries, documents().cu_keys


def run(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    o, lse = softmax_suffix_forward(q, k, v, documents())
    return [o, lse, *softmax_suffix_backward(do, q, k, v, o, lse, documents())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_against_the_definition(dtype: torch.dtype) -> None:
    tensors = draw(dtype)
    for got, want in zip(run(*tensors), wanted(*tensors), strict=True):
        assert got.shape == want.shape and (got.double() - want).norm() <= BOUND[dtype] * want.norm()


def test_flash_gets_all_documents_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offsets and longest documents, for which a stand-in returns nothing else."""
    made: list[tuple[object, ...]] = []
    tensors = draw(torch.bfloat16)
    o, lse, *grads = run(*tensors)
    monkeypatch.setattr(suffixes, "flash_fits", lambda q: True)
    monkeypatch.setattr(flash, "forward", lambda *args: made.append(args[3:]) or (o, lse))
    monkeypatch.setattr(flash, "backward", lambda *args: made.append(args[6:]) or tuple(grads))
    run(*tensors)
    for cu_queries, longest, scale, cu_keys, longest_keys in made:
        assert cu_queries.tolist() == offsets()[0].tolist() and cu_keys.tolist() == offsets()[1].tolist()
        assert (longest, longest_keys, scale) == (96, 97, 0.25)
    assert len(made) == 2


@pytest.mark.parametrize(("queries", "keys", "alone"), [
    ((64,), (160,), True), ((64,), (64,), True), ((60,), (160,), False), ((64, 1), (64, 9), False),
])  # fmt: skip
def test_a_piece_of_a_long_prompt_goes_to_cudnn(
    queries: tuple[int, ...], keys: tuple[int, ...], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both kernels fit, by the number of documents and whether the size is one of few."""
    made: list[tuple[object, ...]] = []
    q, k, v = (
        torch.randn(n, heads, 16, device=DEVICE).double() for n, heads in ((sum(queries), 4), *[(sum(keys), 2)] * 2)
    )
    monkeypatch.setattr(suffixes, "LONG", 32)
    for name in ("flash_fits", "cudnn_fits"):
        monkeypatch.setattr(suffixes, name, lambda q: True)
    monkeypatch.setattr(flash, "forward", lambda *args: made.append(args))
    found = softmax_suffix_forward(q, k, v, documents(queries, keys))
    assert bool(made) is not alone
    if alone:
        before = q.new_zeros(keys[0] - queries[0], 4, 16)
        o, lse = naive_softmax_block(torch.cat([before, q]), k, v, True, 0.25)
        assert torch.allclose(found[0], o[-queries[0] :]) and torch.allclose(found[1], lse[:, -queries[0] :])
    monkeypatch.setattr(suffixes, "_INDEXED", 32 * keys[0] - 1)  # of keys that are too many to be counted
    softmax_suffix_forward(q, k, v, documents(queries, keys))
    assert made


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = draw(torch.float64)
    with pytest.raises(KernelArgumentError, match="keys"):
        documents(keys=(2, *KEYS[1:]))
    with pytest.raises(KernelArgumentError, match=r"k_SGD.*166 tokens.*167"):
        softmax_suffix_forward(q, k[:-1], v[:-1], documents())
    with pytest.raises(KernelArgumentError, match="cu_keys"):
        Suffixes(QUERIES, KEYS, documents().cu_queries, documents().cu_keys.long())

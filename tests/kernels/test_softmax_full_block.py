"""Blocks without a mask, shared between cuDNN and FlashAttention-2, for both of which torch stands in on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.softmax import dispatch, eager, full_block, softmax_backward, softmax_forward
from mmkernels.softmax.backends import cudnn, flash
from mmkernels.softmax.naive import naive_softmax_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Torch in the place of both, with the queries and keys of the forward calls; cuDNN takes from 8 on."""
    made: list[tuple[str, int, int]] = []

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        assert not causal
        made.append(("cudnn", len(q), len(k)))
        return eager.forward(q, k, v, False, scale)

    def full(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        made.append(("flash", len(q), len(k)))
        return eager.forward(q, k, v, False, scale)

    monkeypatch.setattr(full_block, "LEAST", 8)
    monkeypatch.setattr(cudnn, "forward", dense)
    monkeypatch.setattr(cudnn, "backward", eager.backward)
    monkeypatch.setattr(flash, "full_forward", full)
    monkeypatch.setattr(flash, "full_backward", lambda *args: eager.backward(*args[:-1], False, args[-1]))
    return made


SIZES = [
    (32, 48, [("cudnn", 32, 48)]),
    (32, 51, [("cudnn", 32, 48), ("flash", 32, 3)]),
    (37, 48, [("cudnn", 32, 48), ("flash", 5, 48)]),
    (37, 51, [("cudnn", 32, 48), ("flash", 32, 3), ("flash", 5, 51)]),
    (7, 51, [("flash", 7, 51)]),
    (37, 1, [("flash", 37, 1)]),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="torch stands in for the kernels")
@pytest.mark.parametrize(("queries", "keys", "wanted"), SIZES)
def test_round_numbers_go_to_cudnn_and_the_rest_to_flash(
    queries: int, keys: int, wanted: list[tuple[str, int, int]], calls: list[tuple[str, int, int]]
) -> None:
    q, do, o = (draw(queries, 4, 8, seed=seed) for seed in (1, 2, 3))
    k, v = draw(keys, 2, 8, seed=4), draw(keys, 2, 8, seed=5)
    got = full_block.forward(q, k, v, True, 0.3)
    assert calls == wanted
    for mine, other in zip(got, naive_softmax_block(q, k, v, False, 0.3), strict=True):
        assert torch.allclose(mine, other, atol=1e-13)
    lse = got[1] + 0.5  # of more keys than these, as is o
    grads = full_block.backward(do, q, k, v, o, lse, True, 0.3)
    for mine, other in zip(grads, eager.backward(do, q, k, v, o, lse, False, 0.3), strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_without_cudnn_all_goes_to_flash(calls: list[tuple[str, int, int]]) -> None:
    full_block.forward(draw(32, 4, 8, seed=1), draw(48, 2, 8, seed=2), draw(48, 2, 8, seed=3), False, 0.3)
    assert calls == [("flash", 32, 48)]


def test_round_numbers_are_few() -> None:
    found = {full_block.round_part(n, True) for n in range(1 << 17)}
    assert len(found) == 1 + 7 * full_block.STEPS
    assert all(0.75 * n < full_block.round_part(n, True) <= n for n in range(full_block.LEAST, 1 << 17, 97))
    assert full_block.round_part(1 << 14, False) == full_block.round_part(0, True) == 0


def test_only_blocks_without_a_mask_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "flash_fits", lambda q: True)
    monkeypatch.setattr(dispatch, "cudnn_fits", lambda q: True)
    q = torch.empty(9, 4, 8, device="meta")
    assert dispatch.block_for(q, q, causal=False) is dispatch.FullBlock
    assert dispatch.block_for(q, q) is dispatch.block_for(q, q, causal=True) is cudnn


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (77, 200), (1024, 1536), (1300, 1100), (2100, 1), (1, 5000)])
def test_any_sizes_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, dtype: torch.dtype
) -> None:  # fmt: skip
    monkeypatch.setattr(dispatch, "LONG_BLOCK", 1024)
    monkeypatch.setattr(dispatch, "HOPPER_LEAST", 0)
    q, do, far = (draw(queries, 8, 64, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    kv = draw(keys, 2, 2, 64, seed=4, dtype=dtype)  # keys and values beside each other, as they travel
    k, v = kv[:, 0], kv[:, 1]
    o, lse = softmax_forward(q, k, v, False)
    want_o, want_lse = naive_softmax_block(q.double(), k.double(), v.double(), False, 0.125)
    assert (o - want_o).norm() <= 1.5e-2 * want_o.norm() and torch.allclose(lse.double(), want_lse, atol=1e-2)
    lse = lse + 0.5
    grads = softmax_backward(do, q, k, v, far, lse, False)
    exact = eager.backward(*(x.double() for x in (do, q, k, v, far, lse)), False, 0.125)
    for mine, other in zip(grads, exact, strict=True):
        assert mine.dtype == dtype and (mine - other).norm() <= 2e-2 * other.norm()


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    q, k = draw(1300, 8, 64, seed=1, dtype=torch.bfloat16), draw(1700, 2, 64, seed=2, dtype=torch.bfloat16)
    o, lse = softmax_forward(q, k, k, False)  # build cuDNN's graphs first
    softmax_backward(q, q, k, k, o, lse, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        o, lse = softmax_forward(q, k, k, False)
        softmax_backward(q, q, k, k, o, lse, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""What a caller relies on: documents alone, sequences in parts, strides, decode, autocast, no uninitialised memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmkernels import lightning_attention, lightning_decode_step
from tests.kernels.lightning_cases import SLOPES, assert_close, make_problem, run


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 1, 64, 65, 128, 130, 299, 300]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_uninitialised_memory(poisoned: None, cu_seqlens: list[int] | None, dtype: torch.dtype) -> None:
    problem = make_problem(300, cu_seqlens=cu_seqlens, dtype=dtype)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert_close(run(problem, "chunked"), run(problem, "naive", torch.float64), bound)


def inputs(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_problem(tokens, batch=batch, widths=(8, 12)).qkv.to(dtype).split([8, 8, 12], dim=-1)
    return q, k, v


def test_packed_row_equals_its_documents_one_by_one() -> None:
    bounds = [0, 1, 1, 70, 131, 132, 400]
    problem = make_problem(400, cu_seqlens=bounds)
    packed = run(problem, "chunked")
    for n, (lo, hi) in enumerate(pairwise(bounds)):
        alone = make_problem(hi - lo)
        alone.qkv, alone.do = problem.qkv[:, lo:hi], problem.do[:, lo:hi]
        alone.initial, alone.dfinal = problem.initial[n : n + 1], problem.dfinal[n : n + 1]
        rows = {name: x[:, lo:hi] for name, x in packed.items() if name not in ("final", "dinitial")}
        states = {name: packed[name][n : n + 1] for name in ("final", "dinitial")}
        assert_close(rows | states, run(alone, "chunked"), 1e-12)


@pytest.mark.parametrize("cut", [0, 1, 64, 100, 199, 200])
def test_two_parts_with_the_state_carried_equal_the_whole(cut: int) -> None:
    tensors = [x.clone().requires_grad_() for x in inputs(200, batch=2)]
    whole, final = lightning_attention(*tensors, SLOPES, output_final_state=True)
    head, state = lightning_attention(*(x[:, :cut] for x in tensors), SLOPES, output_final_state=True)
    tail, last = lightning_attention(
        *(x[:, cut:] for x in tensors), SLOPES, initial_state=state, output_final_state=True
    )
    parts = torch.cat([head, tail], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last, final, rtol=1e-11, atol=1e-11)
    do, df = torch.randn_like(whole), torch.randn_like(final)
    want = torch.autograd.grad([whole, final], tensors, [do, df])
    got = torch.autograd.grad([parts, last], tensors, [do, df])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


def test_any_strides() -> None:
    q, k, v = inputs(130, torch.float32)
    want, _ = lightning_attention(*(x.contiguous() for x in (q, k, v)), SLOPES)
    # Heads outermost, last dimension not contiguous, every other token, and one head expanded to all.
    q_heads = q.transpose(1, 2).contiguous().transpose(1, 2)
    k_last = k.transpose(1, 3).contiguous().transpose(1, 3)
    v_every = torch.stack([v, v], dim=2).flatten(1, 2)[:, ::2]
    got, _ = lightning_attention(q_heads, k_last, v_every, SLOPES)
    torch.testing.assert_close(got, want)
    shared = k[:, :, :1].expand_as(k)
    do = torch.randn_like(want).transpose(1, 2).contiguous().transpose(1, 2)
    grads = []
    for keys in (shared.contiguous(), shared):
        leaf = q.clone().requires_grad_()
        lightning_attention(leaf, keys, v, SLOPES)[0].backward(do)
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_inputs_are_left_alone_and_runs_are_bitwise_equal() -> None:
    q, k, v = (x.contiguous().requires_grad_() for x in inputs(300, torch.float32))
    before = [x.detach().clone() for x in (q, k, v)]
    initial = torch.randn(1, 4, 8, 12)
    kept = initial.clone()
    runs = []
    for _ in range(2):
        o, final = lightning_attention(q, k, v, SLOPES, initial_state=initial, output_final_state=True)
        runs.append((o, final, *torch.autograd.grad(o.sum() + final.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    assert torch.equal(kept, initial)


def test_future_tokens_change_nothing() -> None:
    q, k, v = (x.clone() for x in inputs(100, torch.float32))
    before, _ = lightning_attention(q, k, v, SLOPES)
    for x in (q, k, v):
        x[:, 50:] = torch.randn_like(x[:, 50:])
    assert torch.equal(lightning_attention(q, k, v, SLOPES)[0][:, :50], before[:, :50])


def test_no_grad_gives_the_same_and_keeps_no_graph() -> None:
    q, k, v = (x.contiguous().requires_grad_() for x in inputs(300, torch.float32))
    with_grad, _ = lightning_attention(q, k, v, SLOPES)
    with torch.no_grad():
        without, final = lightning_attention(q, k, v, SLOPES)
    assert not without.requires_grad and final is None
    torch.testing.assert_close(without, with_grad.detach())


def test_autocast_does_not_lower_the_precision() -> None:
    q, k, v = (x.contiguous().requires_grad_() for x in inputs(200, torch.float32))
    outside = lightning_attention(q, k, v, SLOPES, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lightning_attention(q, k, v, SLOPES, output_final_state=True)
        grads = torch.autograd.grad(inside[0].sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    want = torch.autograd.grad(outside[0].sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_decode_steps_equal_the_full_forward(dtype: torch.dtype) -> None:
    q, k, v = inputs(70, dtype, batch=2)
    want, final = lightning_attention(q, k, v, SLOPES, output_final_state=True)
    _, state = lightning_attention(q[:, :40], k[:, :40], v[:, :40], SLOPES, output_final_state=True)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for t in range(40, 70):
        kept = state.clone()
        o, new = lightning_decode_step(q[:, t], k[:, t], v[:, t], SLOPES, state)
        assert torch.equal(kept, state) and o.dtype == dtype and new.dtype == final.dtype
        torch.testing.assert_close(o, want[:, t], rtol=bound, atol=bound * want.abs().max().item())
        state = new
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)

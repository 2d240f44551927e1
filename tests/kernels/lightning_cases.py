"""Inputs, a literal double-loop formula and a run-and-differentiate helper for the lightning attention tests.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmkernels import lightning_attention
from mmkernels.lightning.checks import state_dtype

# The steepest slope of the released model, its flattest, and both ends of the promised range.
SLOPES = torch.tensor([0.917, 0.0004, 1e-6, 1.0])
# Packed rows for kernels whose chunks have 64 tokens.
PACKED_CHUNKS = {
    "shorter than a chunk": [0, 1, 2, 3, 7, 7, 20, 21, 30, 94],
    "empty at both ends": [0, 0, 0, 40, 40, 190, 190],
    "cuts on the grid": [0, 64, 128, 192, 256],
    "span many chunks": [0, 3, 270, 271, 300],
    "one": [0, 150],
}


@dataclass
class Problem:
    """Float64 inputs whose values are representable in ``dtype``, with gradients to send back."""

    qkv: Tensor
    widths: tuple[int, int]
    slopes: Tensor
    cu_seqlens: Tensor | None
    initial: Tensor | None
    do: Tensor
    dfinal: Tensor | None
    dtype: torch.dtype


def make_problem(
    tokens: int,
    *,
    batch: int = 1,
    widths: tuple[int, int] = (8, 8),
    cu_seqlens: list[int] | None = None,
    states: bool = True,
    dtype: torch.dtype = torch.float64,
    slopes: Tensor = SLOPES,
    row_state: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem; ``states`` adds an initial state and a gradient through the final one, one of each for a packed
    row if ``row_state``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to).double()

    d, e = widths
    heads, count = slopes.shape[0], batch if cu_seqlens is None or row_state else len(cu_seqlens) - 1
    acc = state_dtype(dtype)
    return Problem(
        qkv=normal(batch, tokens, heads, 2 * d + e, to=dtype),
        widths=widths,
        slopes=slopes,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        initial=normal(count, heads, d, e, to=acc) if states else None,
        do=normal(batch, tokens, heads, e, to=dtype),
        dfinal=normal(count, heads, d, e, to=acc) if states else None,
        dtype=dtype,
    )


def run(
    problem: Problem,
    backend: str,
    dtype: torch.dtype | None = None,
    *,
    device: str = "cpu",
    row_state: bool = False,
) -> dict[str, Tensor]:
    """Output, final state and all gradients in float64; q, k, v are strided views of one fused tensor."""
    dtype = dtype or problem.dtype
    d, e = problem.widths
    qkv = problem.qkv.to(device, dtype, copy=True).requires_grad_()
    q, k, v = qkv.split([d, d, e], dim=-1)
    initial = None
    if problem.initial is not None:
        initial = problem.initial.to(device, state_dtype(dtype), copy=True).requires_grad_()
    o, final = lightning_attention(
        q,
        k,
        v,
        problem.slopes.to(device),
        cu_seqlens=None if problem.cu_seqlens is None else problem.cu_seqlens.to(device),
        initial_state=initial,
        output_final_state=problem.dfinal is not None,
        row_state=row_state,
        backend=backend,
    )
    assert o.dtype == dtype and o.shape == (*q.shape[:3], e)
    outputs, grads = [o], [problem.do.to(device, dtype)]
    if problem.dfinal is not None:
        assert final is not None and final.dtype == state_dtype(dtype)
        outputs.append(final)
        grads.append(problem.dfinal.to(device, final.dtype))
    torch.autograd.backward(outputs, grads)
    dq, dk, dv = qkv.grad.double().split([d, d, e], dim=-1)
    result = {"o": o.detach().double(), "dq": dq, "dk": dk, "dv": dv}
    if problem.dfinal is not None:
        result["final"] = final.detach().double()
    if initial is not None:
        result["dinitial"] = initial.grad.double()
    return {name: x.cpu() for name, x in result.items()}


def cut_rows(monkeypatch: pytest.MonkeyPatch, into_chunks: bool) -> None:
    """Make the Triton backend scan rows whole, or in segments of one chunk each, whatever would be fastest."""

    def segments_for(programs: int, tokens: int, chunk: int, processors: int) -> tuple[int, int]:
        length = chunk if into_chunks else -(-max(tokens, 1) // chunk) * chunk
        return -(-max(tokens, 1) // length), length

    monkeypatch.setattr("mmkernels.lightning.triton.autograd.segments_for", segments_for)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Relative error by norm of every tensor, per head, so that a small head cannot hide behind a large one."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        dim = 1 if name in ("final", "dinitial") else 2
        axes = [axis for axis in range(4) if axis != dim]
        assert torch.isfinite(got[name]).all(), name
        if expected.numel():
            error = (got[name] - expected).pow(2).sum(axes).sqrt()
            scale = expected.pow(2).sum(axes).sqrt().clamp(min=1e-30)
            assert (error <= bound * scale).all(), f"{name}: {(error / scale).max().item():.2e} over {bound:.0e}"


def double_loop(problem: Problem) -> Tensor:
    """The formula as it is written, one pair of tokens at a time: o in float64 (no initial state)."""
    d, e = problem.widths
    q, k, v = problem.qkv.split([d, d, e], dim=-1)
    tokens = q.shape[1]
    bounds = [0, tokens] if problem.cu_seqlens is None else problem.cu_seqlens.tolist()
    o = torch.zeros_like(v)
    for lo, hi in pairwise(bounds):
        for t in range(lo, hi):
            for j in range(lo, t + 1):
                decay = torch.exp(-problem.slopes.double() * (t - j))
                dot = (q[:, t] * k[:, j]).sum(-1)
                o[:, t] += (decay * dot).unsqueeze(-1) * v[:, j]
    return o

"""Norms and the rotary embedding beside `torch.compile` of the plain formula.

Floors count tensors of T x D, forward and both ways. RMSNorm reads x, writes n; backward reads dn, x, writes dx: 2, 5.
With the residual sum it reads x, y, writes h, n; backward reads dn, h, writes dx, dy: 4, 8; and 9 where h is used
further, as dh is read then. Gated norm reads o, gate, writes y; backward reads dy, o, gate, writes do, dgate: 3, 8.
Rotation: 2, 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.harness import Bench
from bench.gpu.inputs import normal
from bench.gpu.table import Label, Peer
from mmkernels.norm import add_rms_norm, rms_norm
from mmkernels.norm_gate import norm_gate
from mmkernels.rope import partial_rope

EPS, ALPHA = 1e-5, 3.5565588


def norms(bench: Bench) -> None:
    """The model's widths."""
    tokens, long = bench.cap(16384), bench.cap(32768)
    for run, name, *sizes in (
        (plain_norm, "rms_norm", tokens, 6144),
        (sum_norm, "add_rms_norm", tokens, 6144, False),
        (sum_norm, "add_rms_norm, h used too", tokens, 6144, True),
        (gated_norm, "norm_gate", long, 8192),
        (rotation, "partial_rope", long, 64, 128, 64),
    ):
        bench.case(Label("norms", name, f"{sizes[0]} x {sizes[1]}"), run, *sizes)


def _compare(
    bench: Bench,
    name: str,
    ours: Callable,
    plain: Callable,
    leaves: tuple[Tensor, ...],
    do: Tensor | tuple[Tensor, ...],
    units: tuple[int, int],
) -> None:
    """``ours`` and ``plain`` take the leaves; the floor counts tensors like the first leaf."""
    fast = bench.compiler(plain)
    shape = " x ".join(str(size) for size in leaves[0].shape)
    bench.both_ways(
        Label("norms", name, shape),
        lambda: ours(*leaves),
        Peer("torch.compile", lambda: fast(*leaves)),
        leaves,
        do,
        floors=(units[0] * leaves[0].nbytes, units[1] * leaves[0].nbytes),
        others={"eager": lambda: plain(*leaves)},
    )


def _leaves(bench: Bench, tokens: int, width: int, count: int) -> tuple[Tensor, ...]:
    """That many of [T, D] and one weight [D]."""
    torch.manual_seed(0)
    weight = torch.ones(width, device=bench.device, dtype=torch.bfloat16)
    return tuple(x.requires_grad_() for x in (*(normal(bench.device, tokens, width) for _ in range(count)), weight))


def plain_norm(bench: Bench, tokens: int, width: int) -> None:
    """RMSNorm alone."""
    _compare(
        bench,
        "rms_norm",
        lambda x, weight: rms_norm(x, weight, EPS),
        lambda x, weight: F.rms_norm(x, (width,), weight, EPS),
        _leaves(bench, tokens, width, 1),
        normal(bench.device, tokens, width),
        (2, 5),
    )


def sum_norm(bench: Bench, tokens: int, width: int, used: bool) -> None:
    """With the residual sum; ``used`` gives the sum a gradient of its own.

    Where h is not used (post-norm), the peer may leave it unwritten in the forward pass without gradient.
    """

    def plain(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        h = ALPHA * x + y
        normed = F.rms_norm(h, (width,), weight, EPS)
        return (normed, h) if used else normed

    def ours(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        both = add_rms_norm(x, y, ALPHA, weight, EPS)
        return both if used else both[0]

    leaves = _leaves(bench, tokens, width, 2)
    do = tuple(normal(bench.device, tokens, width) for _ in range(2))
    name = "add_rms_norm, h used too" if used else "add_rms_norm"
    _compare(bench, name, ours, plain, leaves, do if used else do[0], (4, 8 + used))


def gated_norm(bench: Bench, tokens: int, width: int) -> None:
    """RMSNorm over all heads, times a sigmoid gate."""

    def plain(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        wide = o.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return (torch.sigmoid(gate.float()) * weight.float() * normed).to(o.dtype)

    _compare(
        bench,
        "norm_gate",
        lambda o, gate, weight: norm_gate(o, gate, weight, EPS),
        plain,
        _leaves(bench, tokens, width, 2),
        normal(bench.device, tokens, width),
        (3, 8),
    )


def rotation(bench: Bench, tokens: int, heads: int, width: int, rotary: int) -> None:
    """The first half of each head turned."""
    torch.manual_seed(0)
    x = normal(bench.device, tokens, heads, width).requires_grad_()
    power = torch.arange(0, rotary, 2, device=bench.device, dtype=torch.float64) / rotary
    angle = torch.arange(tokens, device=bench.device, dtype=torch.float64)[:, None] * 10000.0**-power
    cos, sin = angle.cos().float(), angle.sin().float()

    def plain(x: Tensor) -> Tensor:
        half = rotary // 2
        c, s = cos[:, None], sin[:, None]
        first, second, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
        parts = (first * c - second * s, second * c + first * s)
        return torch.cat([part.to(x.dtype) for part in parts] + [rest], dim=-1)

    _compare(bench, "partial_rope", lambda x: partial_rope(x, cos, sin), plain, (x,), torch.randn_like(x), (2, 4))

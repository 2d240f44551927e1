"""The mixture of experts around its products: routing, rows to experts and back, and the activation between them.

Floors, in rows of D values, with T tokens, R rows and S of them kept: permute reads T and writes R, unpermute reads S
and writes T; backward, unpermute reads T + S and writes R, permute reads S and writes T.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.harness import Bench, without_gradient
from bench.gpu.inputs import normal
from bench.gpu.table import Label, Peer, Row, floor_goal
from mmkernels.moe import Route, permute, route, unpermute
from mmkernels.swiglu import swiglu

TOKENS, EXPERTS, TOP_K = 16384, 32, 2


def moe(bench: Bench) -> None:
    """Without a capacity and with 1.25 of the even share."""
    tokens = bench.cap(TOKENS)
    for factor in (None, 1.25):
        capacity = None if factor is None else math.ceil(factor * tokens * TOP_K / EXPERTS)
        bench.case(Label("moe", "route", f"T={tokens}"), routing, tokens, capacity)
        for width in (2048, 6144):
            bench.case(Label("moe", "permute, unpermute", f"T={tokens} D={width}"), rows, tokens, width, capacity)


def _shape(tokens: int, capacity: int | None) -> str:
    return f"T={tokens} E={EXPERTS} K={TOP_K} " + ("no capacity" if capacity is None else f"C={capacity}")


def routing(bench: Bench, tokens: int, capacity: int | None) -> None:
    """Routing alone."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, EXPERTS, device=bench.device)

    def derive(row: Row) -> None:
        for name, ms in (("ours_us", row.ours_ms), ("peer_us", row.peer_ms)):
            row.extra[name] = ms * 1e3 if isinstance(ms, float) else ms

    bench.add(
        Label("moe", "route", _shape(tokens, capacity)),
        without_gradient(lambda: route(logits, TOP_K, capacity)),
        Peer("torch topk + sort", without_gradient(lambda: plain_route(logits, TOP_K, capacity))),
        derive=derive,
    )


def rows(bench: Bench, tokens: int, width: int, capacity: int | None) -> None:
    """There and back, with the gradients of the tokens and of the weights."""
    torch.manual_seed(0)
    plan = route(torch.randn(tokens, EXPERTS, device=bench.device), TOP_K, capacity)
    weight = plan.weight_TK.detach().requires_grad_()
    x, do = normal(bench.device, tokens, width).requires_grad_(), normal(bench.device, tokens, width)
    kept, total, row_bytes = int(plan.count_E.sum()), plan.token_R.shape[0], 2 * width
    forward = 2 * tokens + total + kept
    backward = 2 * tokens + total + 2 * kept
    token, assignment = kept_rows(plan)
    bench.both_ways(
        Label("moe", "permute, unpermute", f"D={width} {_shape(tokens, capacity)}"),
        lambda: unpermute(permute(x, plan), weight, plan),
        Peer("torch index_select + index_add", lambda: plain_rows(x, weight, token, assignment)),
        (x, weight),
        do,
        floors=(forward * row_bytes, (forward + backward) * row_bytes),
        goals=(floor_goal(0.75), floor_goal(0.75)),
        derive=lambda row, _: row.extra.update(dropped=tokens * TOP_K - kept),
    )


def kept_rows(plan: Route) -> tuple[Tensor, Tensor]:
    """Token and assignment of each kept row, in the order of the rows."""
    slot = plan.row_TK.flatten().long()
    order = slot.argsort()[int((slot < 0).sum()) :]
    return order // plan.row_TK.shape[1], order


def plain_rows(x: Tensor, weight: Tensor, token: Tensor, assignment: Tensor) -> Tensor:
    """What one writes without kernels."""
    y = x.index_select(0, token)
    weighted = y * weight.flatten().index_select(0, assignment)[:, None].to(y.dtype)
    return torch.zeros_like(x).index_add(0, token, weighted)


def plain_route(logits: Tensor, top_k: int, capacity: int | None) -> tuple[Tensor, ...]:
    """The same decisions with topk and sorts; it never waits for the device either."""
    top, expert = logits.topk(top_k, dim=-1)
    weight, flat = top.softmax(-1), expert.flatten()
    count = torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    if capacity is None:
        order = flat.sort(stable=True).indices
    else:  # lowest weights last in each expert, then dropped
        best = weight.flatten().sort(descending=True, stable=True).indices
        order = best[flat[best].sort(stable=True).indices]
    place = torch.arange(flat.numel(), device=flat.device)
    rank = place - (count.cumsum(0) - count)[flat[order]]
    kept = torch.ones_like(rank, dtype=torch.bool) if capacity is None else rank < capacity
    slot = torch.empty_like(flat)
    slot[order] = torch.where(kept, kept.cumsum(0) - 1, -1)
    return weight, expert, slot.view_as(expert), order // top_k, count


def activation(bench: Bench) -> None:
    """SwiGLU at the width of an expert: forward reads 2 and writes 1, backward reads 3 and writes 2."""
    tokens = bench.cap(32768)
    bench.case(Label("swiglu", "swiglu", f"N={tokens} F=9216"), gated, tokens, 9216)


def plain_swiglu(x: Tensor) -> Tensor:
    """The formula."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated(bench: Bench, tokens: int, width: int) -> None:
    """Ours beside the compiled formula."""
    torch.manual_seed(0)
    x, do = normal(bench.device, tokens, 2 * width).requires_grad_(), normal(bench.device, tokens, width)
    fast = bench.compiler(plain_swiglu)
    bench.both_ways(
        Label("swiglu", "swiglu", f"N={tokens} F={width}"),
        lambda: swiglu(x),
        Peer("torch.compile", lambda: fast(x)),
        (x,),
        do,
        floors=(3 * do.nbytes, 8 * do.nbytes),
    )

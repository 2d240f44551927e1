"""Relative errors of outputs and gradients to float64, ours beside flash-linear-attention, from the same bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import peers
from bench.gpu.harness import Bench
from bench.gpu.inputs import FLATTEST, WIDTH, Attention, normal, slopes_of
from bench.gpu.table import Goal, Label, Peer, Row
from mmkernels import lightning_attention, silu_lightning_attention
from mmkernels.norm_gate import norm_gate

GOAL = Goal("worst_ratio", 1.02, "no error above 1.02 of the peer's", least=False)
BLOCK, TAIL = 65536, 4096
EPS = 1e-6


def errors(bench: Bench) -> None:
    """Steep, flat and nearly no decay at 2048 tokens, and the end of a million."""
    for name, factor in (("slopes x 1", 1.0), (f"slopes x {FLATTEST}", FLATTEST), ("slopes 1e-6", None)):
        bench.case(Label("errors", name, ""), gradients, name, factor)
    bench.case(Label("errors", "layer core", ""), layer_gradients)
    bench.case(Label("errors", "drift", ""), drift, bench.cap(1 << 20))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact one, in float64."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def gradients(bench: Bench, name: str, factor: float | None) -> None:
    """Errors of o, dq, dk and dv; ``factor`` None sets every slope to 1e-6."""
    x = Attention.draw(bench.device, 1, bench.cap(2048), 8, factor or 1.0)
    slopes = x.slopes if factor else torch.full_like(x.slopes, 1e-6)

    def ours(*leaves: Tensor, backend: str = "auto") -> Tensor:
        return lightning_attention(*leaves, slopes, backend=backend)[0]

    _compare(bench, name, x.shape, ("o", "dq", "dk", "dv"), ours, peers.simple_gla(*x.leaves, slopes), x.leaves, x.do)


def layer_gradients(bench: Bench) -> None:
    """Errors of a layer core: output, gradients of the projection before SiLU, of the gate and of the norm's weight."""
    torch.manual_seed(0)
    tokens, heads = bench.cap(2048), 8
    qkv = normal(bench.device, 1, tokens, heads, 3 * WIDTH).requires_grad_()
    gate = normal(bench.device, 1, tokens, heads * WIDTH).requires_grad_()
    weight = torch.nn.Parameter(torch.ones(heads * WIDTH, device=bench.device, dtype=torch.bfloat16))
    slopes = slopes_of(heads, 1.0, bench.device)

    def ours(qkv: Tensor, gate: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
        o = silu_lightning_attention(qkv, slopes, backend=backend).flatten(-2).squeeze(0)
        return norm_gate(o, gate.squeeze(0), weight, EPS, backend="torch" if backend == "chunked" else "auto")[None]

    peer = peers.layer_core(qkv, gate, weight, slopes, EPS)
    shape, names = f"B=1 T={tokens} H={heads} D={WIDTH}", ("o", "dqkv", "dgate", "dweight")
    _compare(bench, "layer core", shape, names, ours, peer, (qkv, gate, weight), normal(bench.device, *gate.shape))


def _compare(
    bench: Bench, name: str, shape: str, names: tuple[str, ...], ours: Callable[..., Tensor], peer: Peer,
    leaves: tuple[Tensor, ...], do: Tensor,
) -> None:  # fmt: skip
    """A row with the errors of ours and the peer's to ours in float64 through torch."""
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    exact = _results(lambda: ours(*wide, backend="chunked"), wide, do.double())
    row = Row("errors", name, shape, peer=peer.name)
    row.extra["ours"] = _errors(names, _results(lambda: ours(*leaves), leaves, do), exact)
    if peer.call is not None:
        try:
            row.extra["peer"] = _errors(names, _results(peer.call, leaves, do), exact)
            row.extra["worst_ratio"] = worst_ratio(row.extra["ours"], row.extra["peer"])
        except Exception as error:
            row.peer_ms = bench.note(f"errors {name}: {peer.name}", error)
    row.finish(GOAL)
    bench.rows.append(row)


def worst_ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The largest of our errors over the peer's."""
    return max(ours[name] / theirs[name] if theirs[name] else float(ours[name] > 0) * 1e9 for name in ours)


def _results(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], do: Tensor) -> tuple[Tensor, ...]:
    o = call()
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def _errors(names: tuple[str, ...], found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    return {name: relative_error(a, b) for name, a, b in zip(names, found, exact, strict=True)}


def drift(bench: Bench, tokens: int) -> None:
    """Error of the last outputs of a long row with little decay: what rounding adds up to in the state."""
    x = Attention.draw(bench.device, 1, tokens, 2)
    slopes = torch.tensor([1e-6, 4e-4], device=bench.device)
    peer = peers.simple_gla(*x.leaves, slopes)
    tail = min(TAIL, tokens)
    row = Row("errors", f"drift, last {tail} outputs, slopes 1e-6 and 4e-4", x.shape, peer=peer.name)
    with torch.no_grad():
        exact = _last_exact(x, slopes, tail)
        row.extra["ours"] = relative_error(lightning_attention(*x.leaves, slopes)[0][:, -tail:], exact)
        if peer.call is not None:
            try:
                row.extra["peer"] = relative_error(peer.call()[:, -tail:], exact)
            except Exception as error:
                row.peer_ms = bench.note(f"errors drift: {peer.name}", error)
    bench.rows.append(row)


def _last_exact(x: Attention, slopes: Tensor, tail: int) -> Tensor:
    """The last outputs in float64, block by block with the state carried; blocks end where the tail begins."""
    tokens, state, start = x.q.shape[1], None, 0
    outputs = x.q.new_empty(0)
    while start < tokens:
        stop = min(start + BLOCK, tokens - tail) if start < tokens - tail else tokens
        block = (leaf[:, start:stop].double() for leaf in x.leaves)
        outputs, state = lightning_attention(
            *block, slopes, initial_state=state, output_final_state=True, backend="chunked"
        )
        start = stop
    return outputs

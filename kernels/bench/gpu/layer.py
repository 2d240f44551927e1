"""What a lightning layer does between its projections: SiLU and split, attention, gated norm."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu import peers
from bench.gpu.harness import Bench, with_backward
from bench.gpu.inputs import WIDTH, normal, slopes_of
from bench.gpu.table import Call, Goal, Label, Row, ratio, ratio_goal
from mmkernels import silu_lightning_attention
from mmkernels.norm_gate import norm_gate

HEADS = 64
EPS = 1e-6
MEMORY = Goal("memory_ratio", 0.60, "at most 0.60 of the peer's memory", least=False)


def layer(bench: Bench) -> None:
    """32K tokens."""
    tokens = bench.cap(32768)
    bench.case(Label("layer", "layer core", f"T={tokens} H={HEADS} D={WIDTH}"), core, tokens)


def core(bench: Bench, tokens: int) -> None:
    """Time both ways, and memory of forward and backward with the gradients of projection, gate and norm weight."""
    torch.manual_seed(0)
    qkv = normal(bench.device, 1, tokens, HEADS, 3 * WIDTH).requires_grad_()
    gate, do = (normal(bench.device, 1, tokens, HEADS * WIDTH) for _ in range(2))
    gate.requires_grad_()
    weight = torch.nn.Parameter(torch.ones(HEADS * WIDTH, device=bench.device, dtype=torch.bfloat16))
    slopes, leaves = slopes_of(HEADS, 1.0, bench.device), (qkv, gate, weight)

    def ours() -> Tensor:
        o = silu_lightning_attention(qkv, slopes).flatten(-2).squeeze(0)
        return norm_gate(o, gate.squeeze(0), weight, EPS)[None]

    label = Label("layer", "layer core", f"T={tokens} H={HEADS} D={WIDTH}")
    peer = peers.layer_core(qkv, gate, weight, slopes, EPS)
    bench.both_ways(label, ours, peer, leaves, do, goals=(ratio_goal(2.5), ratio_goal(2.5)))

    row = Row(*label._replace(name="layer core memory of forward+backward"), peer=peer.name)
    for name, call in (("ours", ours), ("peer", peer.call)):
        if call is not None:
            row.extra[f"{name}_MiB"] = _peak(bench, name, with_backward(call, leaves, do))
    row.extra["memory_ratio"] = ratio(row.extra["ours_MiB"], row.extra.get("peer_MiB"))
    row.finish(MEMORY)
    bench.rows.append(row)


def _peak(bench: Bench, name: str, call: Call) -> float | str | None:
    try:
        peak = bench.peak_bytes(call)
    except Exception as error:
        return bench.note(f"layer core memory: {name}", error)
    return None if peak is None else peak / 2**20

"""Softmax attention of packed rows beside FlashAttention-2 and the rate that cuDNN reaches on whole rows.

Operations: 4 x (pairs of tokens) x D x H forward, half of the pairs under the causal mask; 3.5 times that both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.gpu import peers
from bench.gpu.harness import Bench
from bench.gpu.inputs import WIDTH, documents, normal, offsets
from bench.gpu.table import Goal, Label, Row, ratio

HEADS, GROUPS = 64, 8
LENGTHS = (8192, 32768)
GOAL = Goal("of_dense", 0.90, "0.90 of the dense cuDNN rate")
Rates = dict[tuple[int, bool], float | None]
"""TFLOP/s of cuDNN by length and by whether backward is included."""


def operations(lengths: Sequence[int], back: bool) -> float:
    """Of causal attention inside each document."""
    return sum(4 * n * n * WIDTH * HEADS / 2 for n in lengths) * (3.5 if back else 1.0)


def tflops(lengths: Sequence[int], back: bool, ms: object) -> float | None:
    """Rate of one call; None where it was not timed."""
    return operations(lengths, back) / ms / 1e9 if isinstance(ms, float) else None


def softmax(bench: Bench) -> None:
    """The dense rates first: packed rows are judged by them."""
    rates: Rates = {}
    lengths = bench.lengths(LENGTHS)
    for tokens in lengths:
        bench.case(Label("softmax", "dense", f"T={tokens}"), dense, tokens, rates)
    for tokens in lengths:
        bench.case(Label("softmax", "packed, one document", f"T={tokens}"), packed, "one document", [tokens], rates)
    total = lengths[-1]
    packs = {"4 equal documents": [total // 4] * 4, "documents of 64 to 8192": documents(total, 64, 8192)}
    for name, pack in packs.items():
        bench.case(Label("softmax", f"packed, {name}", f"T={total}"), packed, name, pack, rates)


def draw_dense(bench: Bench, tokens: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves [1, H or G, T, D] and the gradient of the output."""
    torch.manual_seed(0)
    q, k, v = (normal(bench.device, 1, h, tokens, WIDTH).requires_grad_() for h in (HEADS, GROUPS, GROUPS))
    return (q, k, v), torch.randn_like(q)


def dense(bench: Bench, tokens: int, rates: Rates) -> None:
    """The peer alone: cuDNN."""
    leaves, do = draw_dense(bench, tokens)

    def derive(row: Row, back: bool) -> None:
        rates[tokens, back] = row.extra["peer_tflops"] = tflops([tokens], back, row.peer_ms)

    shape = f"T={tokens} H={HEADS}:{GROUPS} D={WIDTH}"
    bench.both_ways(Label("softmax", "dense", shape), None, peers.dense_softmax(*leaves), leaves, do, derive=derive)


def packed(bench: Bench, name: str, lengths: list[int], rates: Rates) -> None:
    """Ours and FlashAttention-2 on one packed row, at the dense rate of a whole row as long."""
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (normal(bench.device, total, h, WIDTH).requires_grad_() for h in (HEADS, GROUPS, GROUPS))
    cu, do = offsets(lengths, bench.device), normal(bench.device, total, HEADS, WIDTH)

    def ours() -> Tensor:
        from mmkernels.softmax import softmax_attention

        return softmax_attention(q, k, v, cu, lengths)

    def derive(row: Row, back: bool) -> None:
        row.extra["tflops"], row.extra["peer_tflops"] = (tflops(lengths, back, ms) for ms in (row.ours_ms, row.peer_ms))
        row.extra["of_dense"] = ratio(row.extra["tflops"], rates.get((total, back)))
        row.extra["documents"] = len(lengths)

    bench.both_ways(
        Label("softmax", f"packed, {name}", f"T={total} H={HEADS}:{GROUPS} D={WIDTH}"),
        ours,
        peers.varlen_softmax(bench, (q, k, v), do, cu, max(lengths)),
        (q, k, v),
        do,
        goals=(GOAL, GOAL),
        derive=derive,
    )

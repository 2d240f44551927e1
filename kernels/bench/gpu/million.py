"""A million tokens: time a token beside that at 32K, and the memory of forward and backward."""

from __future__ import annotations

from bench.gpu import peers
from bench.gpu.harness import Bench, with_backward
from bench.gpu.inputs import Attention
from bench.gpu.lightning import BOTH, FORWARD
from bench.gpu.table import Goal, Label, Row
from mmkernels import lightning_attention

HEADS = 16
SHORT, LONG = 32768, 1 << 20
GOAL = Goal("over_32k_per_token", 1.05, "time a token within 5% of 32K", least=False)


def million(bench: Bench) -> None:
    """32K first, for comparison."""
    per_token: dict[bool, float] = {}
    for tokens in bench.lengths((SHORT, LONG)):
        bench.case(Label("million", "attention", f"T={tokens} H={HEADS}"), row, tokens, per_token)


def row(bench: Bench, tokens: int, per_token: dict[bool, float]) -> None:
    """Both ways at one length; ``per_token`` holds the short row's ns a token and gets them from it."""
    x = Attention.draw(bench.device, 1, tokens, HEADS)

    def ours() -> object:
        return lightning_attention(x.q, x.k, x.v, x.slopes)[0]

    def derive(row: Row, back: bool) -> None:
        if not isinstance(row.ours_ms, float):
            return
        row.extra["ns_per_token"] = row.ours_ms * 1e6 / tokens
        before = per_token.setdefault(back, row.extra["ns_per_token"])
        row.extra["over_32k_per_token"] = row.extra["ns_per_token"] / before
        if back:
            peak = bench.peak_bytes(with_backward(ours, x.leaves, x.do))
            row.extra["peak_tensors_beyond_inputs"] = None if peak is None else peak / x.unit

    goal = GOAL if tokens == LONG else None
    bench.both_ways(
        Label("million", "attention", x.shape),
        ours,
        peers.simple_gla(x.q, x.k, x.v, x.slopes),
        x.leaves,
        x.do,
        floors=(FORWARD * x.unit, BOTH * x.unit),
        goals=(goal, goal),
        derive=derive,
    )

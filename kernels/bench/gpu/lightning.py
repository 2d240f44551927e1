"""Lightning attention beside flash-linear-attention: all heads, few heads, packed documents, short rows.

The floor counts tensors of B x T x H x D: forward reads q, k, v and writes o (4); backward reads q, k, v, do and writes
dq, dk, dv (11 together).
"""

from __future__ import annotations

from dataclasses import replace

from bench.gpu import peers
from bench.gpu.harness import Bench
from bench.gpu.inputs import FLATTEST, Attention, documents, offsets
from bench.gpu.table import Goal, Label, Row, floor_goal, ratio, ratio_goal
from mmkernels import lightning_attention

FORWARD, BOTH = 4, 11
HEADS = 64
LENGTHS = (8192, 32768, 131072)
Goals = tuple[Goal | None, Goal | None]
NO_GOALS: Goals = (None, None)


def compare(
    bench: Bench, group: str, batch: int, tokens: int, heads: int, factor: float = 1.0, goals: Goals = NO_GOALS
) -> None:
    """Both ways of one shape."""
    x = Attention.draw(bench.device, batch, tokens, heads, factor)
    name = "attention" if factor == 1.0 else f"attention, slopes x {factor}"
    bench.both_ways(
        Label(group, name, x.shape),
        lambda: lightning_attention(x.q, x.k, x.v, x.slopes)[0],
        peers.simple_gla(x.q, x.k, x.v, x.slopes),
        x.leaves,
        x.do,
        floors=(FORWARD * x.unit, BOTH * x.unit),
        goals=goals,
    )


def _case(bench: Bench, group: str, batch: int, tokens: int, heads: int, *rest: object) -> None:
    label = Label(group, "attention", f"B={batch} T={tokens} H={heads}")
    bench.case(label, compare, group, batch, tokens, heads, *rest)


def long_rows(bench: Bench) -> None:
    """64 heads, one row."""
    for tokens in bench.lengths(LENGTHS):
        goals = (floor_goal(0.90), floor_goal(0.70)) if tokens >= 32768 else NO_GOALS
        _case(bench, "lightning", 1, tokens, HEADS, 1.0, goals)


def few_heads(bench: Bench) -> None:
    """A tensor-parallel rank's heads; slow decay, which makes more segments' states count, without a goal."""
    tokens = bench.cap(LENGTHS[-1])
    for heads, forward, both in ((16, 0.65, 0.50), (8, 0.60, 0.45)):
        goals = (floor_goal(forward), floor_goal(both)) if tokens == LENGTHS[-1] else NO_GOALS
        for factor in (1.0, FLATTEST):
            _case(bench, "few_heads", 1, tokens, heads, factor, goals if factor == 1.0 else NO_GOALS)


def short_rows(bench: Bench) -> None:
    """Where launches weigh as much as work, and are timed with it; never slower than FLA."""
    bench = replace(bench, timer=bench.launched)
    for tokens in bench.lengths((512, 1024, 2048, 4096)):
        for batch in (1, 4, 16):
            _case(bench, "short", batch, tokens, HEADS, 1.0, (ratio_goal(1.0), ratio_goal(1.0)))


def varlen(bench: Bench) -> None:
    """Packed documents beside one document of the same length."""
    for tokens in bench.lengths(LENGTHS):
        bench.case(Label("varlen", "packed", f"T={tokens} H={HEADS}"), packed, tokens)


def packed(bench: Bench, tokens: int) -> None:
    """Documents of 64 to 4096 tokens in a row of ``tokens``."""
    x = Attention.draw(bench.device, 1, tokens, HEADS)
    lengths = documents(tokens, 64, 4096)
    cu = offsets(lengths, bench.device)
    allowed = 1.05 if tokens >= 32768 else 1.10
    goal = Goal("over_uniform", allowed, f"within {allowed - 1:.0%} of one document", least=False)

    def derive(row: Row, _: bool) -> None:
        row.extra.update(over_uniform=ratio(row.ours_ms, row.extra["uniform_ms"]), documents=len(lengths))

    bench.both_ways(
        Label("varlen", "packed", x.shape),
        lambda: lightning_attention(x.q, x.k, x.v, x.slopes, cu_seqlens=cu)[0],
        peers.simple_gla(x.q, x.k, x.v, x.slopes, cu.long()),
        x.leaves,
        x.do,
        floors=(FORWARD * x.unit, BOTH * x.unit),
        goals=(goal, goal),
        others={"uniform": lambda: lightning_attention(x.q, x.k, x.v, x.slopes)[0]},
        derive=derive,
    )

"""Lightning attention of a rank's chunks under context parallelism, beside the same tokens on one GPU.

A rank of 4 has 8 chunks of a row of 32; the other ranks' states lie ready, as if the all-gather had taken no time. Ours
is everything that the rank computes: its chunks' states, the states that enter the chunks, the scans. Documents have
many lengths, and are cut at the edges of chunks.

The floor counts tensors of T x H x D as that of one GPU does (`lightning.py`), so that both can be compared: k and v,
and in backward q and do, are read once more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.harness import Bench, with_backward, without_gradient
from bench.gpu.inputs import WIDTH, documents, normal, offsets, slopes_of
from bench.gpu.lightning import BOTH, FORWARD, HEADS
from bench.gpu.table import Goal, Label, Row, ratio
from mmkernels import lightning_attention, silu_lightning_attention
from mmkernels.lightning import ChunkPlan, chunks_backward, chunks_forward, lightning_segment_states, states_between

GROUP = "chunks"
LENGTHS = (16384, 65536, 262144)
RANKS, CHUNKS = 4, 8
GOAL = Goal("of_single", 0.65, "0.65 of one GPU's rate", least=True)


def chunks(bench: Bench) -> None:
    """Both ways, of q, k and v and of a layer's projection before its SiLU."""
    for tokens in bench.lengths(LENGTHS):
        for silu in (False, True):
            name = "SiLU and attention" if silu else "attention"
            bench.case(Label(GROUP, name, f"T={tokens} H={HEADS}"), compare, name, tokens, silu)


def compare(bench: Bench, name: str, tokens: int, silu: bool) -> None:
    """Both ways of one length."""
    part = Part(bench.device, tokens, silu)
    label = Label(GROUP, name, f"T={tokens} H={HEADS} D={WIDTH} chunks={CHUNKS} documents={part.documents}")
    unit = tokens * HEADS * WIDTH * part.raw.element_size()
    single = with_backward(part.single, part.leaves, part.do)

    def derive(row: Row) -> None:
        row.extra["of_single"] = ratio(row.extra["single_ms"], row.ours_ms)

    goal = GOAL if tokens >= LENGTHS[0] and not silu else None
    parts: dict[str, Callable[[], object]] = {"states": part.states, "between": part.between}
    forward = {"single": without_gradient(part.single), **parts}
    back = {"states": lambda: part.states(True), "between": lambda: part.between(True)}
    bench.add(
        label._replace(name=f"{name} forward"), part.forward, floor=FORWARD * unit, goal=goal, others=forward,
        derive=derive,
    )  # fmt: skip
    bench.add(
        label._replace(name=f"{name} forward+backward"), part.both, floor=BOTH * unit,
        others={"single": single, **back}, derive=derive,
    )  # fmt: skip


class Part:
    """A rank's part of a row, and what it computes."""

    def __init__(self, device: torch.device, tokens: int, silu: bool) -> None:
        torch.manual_seed(0)
        self.silu, self.slopes = silu, slopes_of(HEADS, 1.0, device)
        self.raw, self.do = normal(device, 1, tokens, HEADS, 3 * WIDTH), normal(device, 1, tokens, HEADS, WIDTH)
        self.raw = self.raw if silu else F.silu(self.raw)
        self.leaves = [x.detach().requires_grad_() for x in ([self.raw] if silu else self.raw.chunk(3, dim=3))]
        size, lengths = tokens // CHUNKS, documents(tokens, min(64, tokens), max(4096, tokens // 4))
        starts = {0, *accumulate(lengths)} - {tokens}
        edges = range(0, tokens, size)
        enters = [edge not in starts for edge in edges]
        through = [
            enters[c] and c + 1 < CHUNKS and enters[c + 1] and not any(edge < s < edge + size for s in starts)
            for c, edge in enumerate(edges)
        ]
        every, self.documents = range(RANKS * CHUNKS), len(lengths)
        self.plan = ChunkPlan.of(size, through * RANKS, enters * RANKS, every[:CHUNKS], every, device)
        self.whole = offsets(lengths, device)
        self.cut = torch.tensor(sorted(starts | {*edges, tokens}), dtype=torch.int32, device=device)
        self.gathered = torch.randn(len(every), HEADS, WIDTH, WIDTH, device=device)
        self.act = self.activation()

    def activation(self) -> Tensor:
        """What attention is taken of."""
        return F.silu(self.raw) if self.silu else self.raw

    def single(self) -> Tensor:
        """The same tokens on one GPU, with autograd."""
        if self.silu:
            return silu_lightning_attention(*self.leaves, self.slopes, cu_seqlens=self.whole)
        return lightning_attention(*self.leaves, self.slopes, cu_seqlens=self.whole)[0]

    def states(self, reverse: bool = False) -> Tensor:
        """What this rank's chunks leave on their own."""
        q, k, v = self.act.chunk(3, dim=3)
        pair = (q, self.do) if reverse else (k, v)
        return lightning_segment_states(*pair, self.slopes, segments=CHUNKS, cu_seqlens=self.cut, reverse=reverse)

    def between(self, reverse: bool = False) -> Tensor:
        """What enters this rank's chunks."""
        return states_between(self.gathered, self.slopes, self.plan, reverse=reverse)

    def forward(self) -> tuple[Tensor, ...]:
        """Activation, states before the chunks, output and what backward needs."""
        self.act = self.activation()
        self.states()
        before = self.between()
        o, saved = chunks_forward(*self.act.chunk(3, dim=3), self.slopes, self.cut, before)
        return o, before, *saved

    def both(self) -> Tensor:
        """Forward, then the gradient of the projection."""
        _, before, *saved = self.forward()
        self.states(reverse=True)
        grad, raw = torch.empty_like(self.raw), self.raw.chunk(3, dim=3)
        chunks_backward(
            *self.act.chunk(3, dim=3), self.do, self.slopes, self.cut, before, lambda: self.between(reverse=True),
            tuple(saved), grad.chunk(3, dim=3), raw=raw if self.silu else None,
        )  # fmt: skip
        return grad

"""Softmax attention of rows that GPUs share, beside all-gather, Ulysses, and one GPU alone.

Useful operations: 4 x pairs x heads x width forward, 2.5 times that backward; a GPU's share of the row's is what its
rate counts, however uneven the work is. One GPU alone has the first documents of the same row, as many tokens as it has
of the row: its rate is what the ways could reach.

Legend: S tokens of a rank, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmkernels.softmax import softmax_attention
from mmtrain.bench.context_peers import HeadExchange, plain_gather
from mmtrain.bench.context_report import Bench, Figures, check
from mmtrain.bench.context_rows import cut_row, first_tokens, pairs, short_documents
from mmtrain.bench.timing import timed_apart
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.context.softmax_cp import context_softmax

TABLES = {"balanced": 8, "zigzag": 2, "contiguous": 1}
"""Chunks a rank of each table."""
LONGEST_ONE_CALL = 2**13
"""Tokens of a chunk up to which the way of one call is measured: four times those up to which it is chosen."""
CHECKED = 2**16
"""Tokens of a row up to which results are compared with those of one GPU."""


@dataclass(frozen=True)
class Heads:
    """Heads, key/value heads and head width, and the dtype of the inputs."""

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype

    def draw(self, tokens: int, device: torch.device, seed: int) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator(device).manual_seed(seed)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            torch.randn(tokens, n, self.width, device=device, dtype=self.dtype, generator=generator) for n in counts
        ]


class Row:
    """A row of one length that all ways compute.

    Attributes:
        alone: TFLOP/s, forward and backward, of one GPU with its share of the tokens; None until they are known.
    """

    def __init__(self, bench: Bench, heads: Heads, tokens: int) -> None:
        self.bench, self.heads, self.tokens = bench, heads, tokens
        self.lengths = short_documents(tokens * bench.ranks)
        bench.documents[f"softmax, {tokens} tokens a GPU, {bench.ranks} GPUs"] = list(self.lengths)
        self.alone: list[float] | None = None
        self._whole: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def whole(self) -> Packing:
        """The row before it is cut."""
        return Packing.from_lengths(list(self.lengths), self.bench.device)

    def prepare(self) -> None:
        """Compute the whole row on every rank, if it is short enough, for others to be compared with."""
        if self.tokens * self.bench.ranks <= CHECKED:
            inputs, packing = self.heads.draw(self.tokens * self.bench.ranks, self.bench.device, 0), self.whole
            leaves = [x.requires_grad_() for x in inputs[:3]]
            o = softmax_attention(*leaves, packing.cu_seqlens, packing.lengths)
            self._whole = inputs, [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]

    def inputs(self, index_S: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """q, k, v and the gradient of the output at places of the row, and what is wanted of them, if known."""
        if self._whole is None or index_S is None:
            return self.heads.draw(self.tokens, self.bench.device, 1 + self.bench.rank), None
        return tuple([x.detach()[index_S] for x in tensors] for tensors in self._whole)

    def measure(
        self, call: Callable[..., Tensor], index_S: Tensor | None, lengths: Sequence[int], gpus: int
    ) -> Figures:
        """Times and rates of one way; `lengths` are the documents whose work so many GPUs share."""
        (*qkv, do), wanted = self.inputs(index_S)
        leaves = [x.requires_grad_() for x in qkv]
        *times, found = timed_apart(lambda: call(*leaves), leaves, do, self.bench.seconds)
        useful = 4 * pairs(lengths) * self.heads.heads * self.heads.width / gpus
        rates = [part * useful / ms / 1e9 for part, ms in zip((1.0, 2.5), times, strict=True)]
        figures: Figures = {}
        for name, ms, rate in zip(("forward", "backward"), times, rates, strict=True):
            figures |= {f"{name}_ms": round(ms, 3), f"{name}_tflops": float(f"{rate:.4g}")}
        if index_S is None:
            self.alone = rates
        elif self.alone is not None:
            figures["of_alone"] = ", ".join(f"{a / b:.2f}" for a, b in zip(rates, self.alone, strict=True))
        return figures | check(found, wanted)

    def measure_shared(self, call: Callable[..., Tensor], balance: float, index_S: Tensor) -> Figures:
        """Those of a way that shares the row."""
        return self.measure(call, index_S, self.lengths, self.bench.ranks) | {"balance": round(balance, 4)}

    def ours(self, table: str, way: str) -> Figures:
        """This repository's, under a table."""
        bench = self.bench
        packing = cut_row(self.lengths, bench.ranks, bench.rank, table, TABLES[table], bench.device)
        call = partial(context_softmax, packing=packing, group=bench.group, way=way)
        return self.measure_shared(call, packing.balance, packing.index_S)

    def all_gather(self) -> Figures:
        """All keys and values of the row on each rank."""
        bench = self.bench
        packing = cut_row(self.lengths, bench.ranks, bench.rank, "contiguous", 1, bench.device)
        call = partial(plain_gather, packing=packing, group=bench.group)
        return self.measure_shared(call, packing.balance, packing.index_S)

    def ulysses(self) -> Figures:
        """All tokens of a share of the heads on each rank, which is always even."""
        bench, whole = self.bench, self.whole
        mine_S = torch.arange(self.tokens, device=bench.device) + bench.rank * self.tokens
        call = partial(HeadExchange(bench.group).softmax, packing=whole)
        return self.measure_shared(call, 1.0, mine_S)

    def one_gpu(self) -> Figures:
        """Its share of the tokens, and nobody to talk to; the slowest of the GPUs, which do the same at once."""
        lengths = first_tokens(self.lengths, self.tokens)
        packing = Packing.from_lengths(list(lengths), self.bench.device)
        call = partial(softmax_attention, cu_seqlens=packing.cu_seqlens, lengths=packing.lengths)
        return self.measure(call, None, lengths, 1)


def ways(chunk_tokens: int) -> tuple[str, ...]:
    """Those that are measured with such chunks."""
    return ("allgather", "ring", *(("varlen",) if chunk_tokens <= LONGEST_ONE_CALL else ()))


def measure_softmax(bench: Bench, part: str, heads: Heads, lengths: Sequence[int], tables: Sequence[str]) -> None:
    """Measure every way at each number of tokens a GPU."""
    for tokens in lengths:
        row, label = Row(bench, heads, tokens), {"tokens": tokens}
        try:
            row.prepare()
        except torch.OutOfMemoryError:
            row = Row(bench, heads, tokens)
        bench.case(part, label | {"way": "one GPU alone"}, row.one_gpu)
        for table in tables:
            for way in ways(tokens // TABLES[table]):
                bench.case(part, label | {"way": way, "table": table}, partial(row.ours, table, way))
        bench.case(part, label | {"way": "plain all-gather", "table": "contiguous"}, row.all_gather)
        bench.case(part, label | {"way": "Ulysses", "table": "heads"}, row.ulysses)
        del row

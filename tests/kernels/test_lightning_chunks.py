"""Chunks of a row with states of their own: put together again they are the row, forward and backward.

Legend: T tokens, H heads, D width of q and k, E width of v, M chunks of the row, C tokens of a chunk.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning import chunks_backward, chunks_forward, lightning_segment_states, states_between
from mmkernels.lightning.naive import naive_lightning_attention

ROWS = {
    "short documents": (3, 1, 2, 7, 0, 5, 6),
    "one document": (24,),
    "an edge": (8, 4, 12),
    "spans all but one": (3, 20, 1),
    "of prime lengths": (13, 11),
}
SLOPES = torch.tensor([1.0, 0.004, 0.0])


def _inputs(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    tokens, heads = sum(lengths), len(SLOPES)
    return [torch.randn(1, tokens, heads, width, generator=generator, dtype=dtype) for width in (4, 4, 5, 5)]


def _reference(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """Output, dq, dk and dv of the recurrence in float64."""
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    o, _ = naive_lightning_attention(*leaves, SLOPES.double(), cu_seqlens, None)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.double())]


class Row:
    """A row cut into chunks; each rank's part is worked on by itself."""

    def __init__(self, lengths: tuple[int, ...], chunks: int, table: list[list[int]], backend: str = "auto") -> None:
        self.size, self.table, self.backend = sum(lengths) // chunks, table, backend
        self.starts = sorted({*accumulate(lengths, initial=0)} - {sum(lengths)})
        edges = [self.size * c for c in range(chunks)]
        self.enters = [edge not in self.starts for edge in edges]
        self.through = [
            self.enters[c] and (c + 1 < chunks and self.enters[c + 1])
            and not any(edges[c] < s < edges[c] + self.size for s in self.starts) for c in range(chunks)
        ]  # fmt: skip
        place = [chunk for mine in table for chunk in mine]
        self.place = [place.index(c) for c in range(chunks)]

    def part(self, x: Tensor, mine: list[int]) -> Tensor:
        return torch.cat([x[:, c * self.size : (c + 1) * self.size] for c in mine], 1)

    def offsets(self, mine: list[int]) -> Tensor:
        found, at = [0], 0
        for c in mine:
            found += [at + s - c * self.size for s in self.starts if c * self.size < s < (c + 1) * self.size]
            at += self.size
            found.append(at)
        return torch.tensor(found, dtype=torch.int32)

    def states(self, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
        """Those of all ranks, one after another."""
        found = [
            lightning_segment_states(
                self.part(b, mine), self.part(c, mine), SLOPES, segments=len(mine), cu_seqlens=self.offsets(mine),
                reverse=reverse, backend=self.backend,
            )[0] for mine in self.table
        ]  # fmt: skip
        return torch.cat(found)

    def between(self, states: Tensor, mine: list[int], reverse: bool) -> Tensor:
        return states_between(states, SLOPES, self.size, self.through, self.enters, mine, self.place, reverse=reverse)

    def run(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
        states, dstates = self.states(k, v, False), self.states(q, do, True)
        results = [torch.full_like(x, torch.nan) for x in (v, q, k, v)]
        for mine in self.table:
            parts, offsets = [self.part(x, mine) for x in (q, k, v)], self.offsets(mine)
            before = self.between(states, mine, False)
            o, saved = chunks_forward(*parts, SLOPES, offsets, before, backend=self.backend)
            grads = tuple(torch.full_like(x, torch.nan) for x in parts)
            chunks_backward(
                *parts, self.part(do, mine), SLOPES, offsets, before,
                lambda mine=mine: self.between(dstates, mine, True), saved, grads, backend=self.backend,
            )  # fmt: skip
            for whole, part in zip(results, (o, *grads), strict=True):
                for n, c in enumerate(mine):
                    whole[:, c * self.size : (c + 1) * self.size] = part[:, n * self.size : (n + 1) * self.size]
        return results


TABLES = {"contiguous": [[0, 1], [2, 3]], "zigzag": [[0, 3], [1, 2]], "alone": [[0], [1], [2], [3]]}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_chunks_are_the_row(lengths: tuple[int, ...], table: str) -> None:
    inputs = _inputs(lengths)
    found = Row(lengths, 4, TABLES[table]).run(*inputs)
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, _reference(lengths, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_chunk_does_not_depend_on_who_has_it() -> None:
    inputs = _inputs(ROWS["spans all but one"], torch.float32)
    found = [Row(ROWS["spans all but one"], 4, table).run(*inputs) for table in TABLES.values()]
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


def test_gradients_are_those_of_the_projection_before_its_silu() -> None:
    q, k, v, do = _inputs(ROWS["one document"])
    act = tuple(torch.nn.functional.silu(x) for x in (q, k, v))
    cu_seqlens, before = torch.tensor([0, 24]), torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    _, saved = chunks_forward(*act, SLOPES, cu_seqlens, before)
    grads = tuple(torch.full_like(x, torch.nan) for x in act)
    chunks_backward(*act, do, SLOPES, cu_seqlens, before, lambda: torch.zeros_like(before), saved, grads, raw=(q, k, v))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, _ = naive_lightning_attention(*map(torch.nn.functional.silu, leaves), SLOPES.double(), cu_seqlens, None)
    for x, y in zip(grads, torch.autograd.grad(o, leaves, do), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_chunks_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = _inputs((24,))
    states = torch.zeros(5, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(KernelArgumentError, match="5 chunks"):
        chunks_forward(q, k, v, SLOPES, torch.tensor([0, 24]), states)
    with pytest.raises(KernelArgumentError, match="edge of a chunk of 6"):
        chunks_forward(q, k, v, SLOPES, torch.tensor([0, 12, 24]), states[:4])

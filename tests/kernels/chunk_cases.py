"""A packed row cut into chunks that ranks share, for the tests of lightning attention's chunks.

Legend: T tokens, H heads, D width of q and k, E width of v, M chunks of the row, C tokens of a chunk.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from mmkernels.lightning import ChunkPlan, chunks_backward, chunks_forward, lightning_segment_states, states_between
from mmkernels.lightning.naive import naive_lightning_attention

NAMES = ("o", "dq", "dk", "dv")
TABLES = {"contiguous": [[0, 1], [2, 3]], "zigzag": [[0, 3], [1, 2]], "alone": [[0], [1], [2], [3]]}


def chunk_inputs(
    tokens: int, slopes: Tensor, widths: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Random q, k, v and gradient of the output."""
    generator = torch.Generator().manual_seed(seed + tokens)
    d, e = widths
    return [
        torch.randn(1, tokens, len(slopes), width, generator=generator, dtype=torch.float64).to(dtype)
        for width in (d, d, e, e)
    ]


def whole_row(
    lengths: tuple[int, ...], slopes: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, silu: bool = False
) -> list[Tensor]:
    """Output, dq, dk and dv of the recurrence in float64; with `silu`, those of the tensors whose SiLU it takes."""
    leaves = [x.double().cpu().detach().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    inputs = map(torch.nn.functional.silu, leaves) if silu else leaves
    o, _ = naive_lightning_attention(*inputs, slopes.double().cpu(), cu_seqlens, None)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.double().cpu())]


class Row:
    """A row cut into chunks; each rank's part is worked on by itself."""

    def __init__(
        self, lengths: tuple[int, ...], table: list[list[int]], slopes: Tensor, backend: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        chunks = sum(map(len, table))
        self.size, self.table, self.backend, self.device = sum(lengths) // chunks, table, backend, device
        self.slopes = slopes.to(device)
        self.starts = sorted({*accumulate(lengths, initial=0)} - {sum(lengths)})
        edges = [self.size * c for c in range(chunks)]
        enters = [edge not in self.starts for edge in edges]
        through = [
            enters[c] and (c + 1 < chunks and enters[c + 1])
            and not any(edges[c] < s < edges[c] + self.size for s in self.starts) for c in range(chunks)
        ]  # fmt: skip
        gathered = [chunk for mine in table for chunk in mine]
        place = [gathered.index(c) for c in range(chunks)]
        self.plans = [ChunkPlan.of(self.size, through, enters, mine, place, device) for mine in table]

    def part(self, x: Tensor, mine: list[int]) -> Tensor:
        return torch.cat([x[:, c * self.size : (c + 1) * self.size] for c in mine], 1)

    def offsets(self, mine: list[int]) -> Tensor:
        found, at = [0], 0
        for c in mine:
            found += [at + s - c * self.size for s in self.starts if c * self.size < s < (c + 1) * self.size]
            at += self.size
            found.append(at)
        return torch.tensor(found, dtype=torch.int32, device=self.device)

    def states(self, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
        """Those of all ranks, one after another."""
        found = [
            lightning_segment_states(
                self.part(b, mine), self.part(c, mine), self.slopes, segments=len(mine), cu_seqlens=self.offsets(mine),
                reverse=reverse, backend=self.backend,
            )[0] for mine in self.table
        ]  # fmt: skip
        return torch.cat(found)

    def between(self, states: Tensor, rank: int, reverse: bool) -> Tensor:
        return states_between(states, self.slopes, self.plans[rank], reverse=reverse, backend=self.backend)

    def run(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, silu: bool = False) -> list[Tensor]:
        """Output, dq, dk and dv, put together from all ranks; gradients are views of one tensor as a projection's."""
        q, k, v, do = (x.to(self.device) for x in (q, k, v, do))
        raw, (q, k, v) = (q, k, v), [torch.nn.functional.silu(x) if silu else x for x in (q, k, v)]
        states, dstates = self.states(k, v, False), self.states(q, do, True)
        results = [torch.full_like(x, torch.nan) for x in (v, q, k, v)]
        for rank, mine in enumerate(self.table):
            parts, offsets = [self.part(x, mine) for x in (q, k, v)], self.offsets(mine)
            before = self.between(states, rank, False)
            o, saved = chunks_forward(*parts, self.slopes, offsets, before, backend=self.backend)
            widths = [x.shape[3] for x in parts]
            fused = torch.full((*parts[0].shape[:3], sum(widths)), torch.nan, dtype=q.dtype, device=self.device)
            grads = fused.split(widths, dim=3)
            chunks_backward(
                *parts, self.part(do, mine), self.slopes, offsets, before,
                lambda rank=rank: self.between(dstates, rank, True), saved, grads, backend=self.backend,
                raw=torch.cat([self.part(x, mine) for x in raw], 3).split(widths, dim=3) if silu else None,
            )  # fmt: skip
            for whole, part in zip(results, (o, *grads), strict=True):
                for n, c in enumerate(mine):
                    whole[:, c * self.size : (c + 1) * self.size] = part[:, n * self.size : (n + 1) * self.size]
        return [x.cpu() for x in results]

"""A document in a row that ranks share, beside other neighbours: its outputs and gradients are its own.

To the bit where it lies at the same place in the row and chunks have the same owners: nothing of another document
enters a product but multiplied by zero. Elsewhere in the row it falls into other tiles, which round differently.

Legend: T tokens of the row, H heads, X columns of all inputs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.context.lightning_cp import begin_context_lightning
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.context.softmax_cp import context_softmax
from mmtrain.parallel.context.state_exchange import StateExchange
from tests.dist.context_rows import TOKENS, document_of, packing_of, table_of
from tests.dist.pool import Pool

SLOPES = torch.tensor([1.0, 0.004, 0.0, 0.3])
HEADS, WIDTH, LENGTH = len(SLOPES), 4, 31  # tokens of the document: in six chunks or seven
MIXERS = ("lightning", "allgather", "ring", "varlen")


@dataclass(frozen=True)
class Row:
    """The document between neighbours of these lengths.

    Attributes:
        before: lengths of the documents before it; what they leave of the row is documents of `after`.
        after: likewise.
        table: who owns which chunk.
        seed: of what the neighbours say.
        scale: of the same.
    """

    before: tuple[int, ...] = (29,)
    after: tuple[int, ...] = (36,)
    table: str = "zigzag"
    seed: int = 1
    scale: float = 1.0

    @property
    def lengths(self) -> tuple[int, ...]:
        return (*self.before, LENGTH, *self.after)


def inputs(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [T, H, X] of the mixer, the gradient of its output, and which tokens are the document's, bool [T]."""
    mine = document_of(row.lengths) == len(row.before)
    tensors = []
    for width in (3 * WIDTH, WIDTH):
        own, others = (torch.Generator().manual_seed(seed) for seed in (7, row.seed))
        x = torch.randn(TOKENS, HEADS, width, generator=others) * row.scale
        x[mine] = torch.randn(LENGTH, HEADS, width, generator=own)
        tensors.append(x)
    return (*tensors, mine)


def attention(mixer: str, x_SHX: Tensor, packing: ContextPacking) -> Tensor:
    if mixer == "lightning":
        return begin_context_lightning(x_SHX, SLOPES, packing, StateExchange(dist.group.WORLD))()
    return context_softmax(*x_SHX.chunk(3, -1), packing, dist.group.WORLD, mixer)


def of_the_document(mixer: str, rows: list[Row]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Outputs, gradients of the inputs, and places in the document, of this rank's tokens of it."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        return [_of_the_document(mixer, row) for row in rows]
    finally:
        mesh.stop()


def _of_the_document(mixer: str, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    packing = packing_of(row.lengths, table_of(row.table, row.lengths, dist.get_world_size()), dist.get_rank())
    x, do, mine = (whole.index_select(0, packing.index_S) for whole in inputs(row))
    x.requires_grad_()
    o = attention(mixer, x, packing)
    (grad,) = torch.autograd.grad(o, x, do)
    return o.detach()[mine], grad[mine], packing.index_S[mine] - sum(row.before)


def found(pool: Pool, mixer: str, rows: list[Row]) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of the whole document in each row."""
    by_rank = pool.run(of_the_document, mixer, rows, world=4)
    wholes = []
    for parts in zip(*by_rank, strict=True):
        assert sum(len(places) > 0 for *_, places in parts) > 1, "one rank has all of the document"
        order = torch.cat([places for *_, places in parts]).argsort()
        wholes.append(tuple(torch.cat([part[i] for part in parts])[order] for i in (0, 1)))
    return wholes


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_does_not_depend_on_its_neighbours(pool: Pool, mixer: str) -> None:
    alike = [
        Row(),
        Row(seed=2),
        Row(seed=3, scale=1e3),
        Row(before=(1,) * 29, after=(1, 2, 3, 5, 25)),
        Row(before=(13, 16), after=(7, 29), seed=4),
    ]
    for table in ("zigzag", "contiguous", "random 1"):
        first, *others = found(pool, mixer, [replace(row, table=table) for row in alike])
        for row, other in zip(alike[1:], others, strict=True):
            assert torch.equal(other[0], first[0]), f"outputs beside {row}"
            assert torch.equal(other[1], first[1]), f"gradients beside {row}"


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_is_the_same_at_any_place(pool: Pool, mixer: str) -> None:
    rows = [Row(), Row(before=(), after=(65,)), Row(before=(65,), after=()), Row(before=(12, 24), after=(20, 9))]
    first, *others = found(pool, mixer, [replace(row, table="zigzag") for row in rows])
    for row, other in zip(rows[1:], others, strict=True):
        for x, y in zip(other, first, strict=True):
            assert (x - y).abs().max() < 1e-5 * y.abs().max(), row

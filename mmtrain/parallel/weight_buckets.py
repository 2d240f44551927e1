"""Weights that travel together: the parts of all ranks, one after another, in the memory of a bucket.

Legend: W ranks, C elements of a rank's parts of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.parallel.collectives import start_gather_into, start_scatter_sum_into
from mmtrain.parallel.layout import BUCKET_ELEMENTS


@dataclass(frozen=True)
class ShardedWeight:
    """A weight that every rank has whole, and of which a shard is this rank's to update.

    Attributes:
        whole: to compute with.
        total: fp32, of the shape of `whole`: sum of this rank's gradients; None of a weight that is only gathered.
        shard: fp32, this rank's part of the weight; ranks have equal parts along `dim`, the last ones less or nothing.
        grad: fp32, of the shape of `shard`: its gradient, the mean over the ranks; None as `total`.
        dim: dimension along which the weight is cut.
        unit: whose forward pass needs it.
    """

    whole: Tensor
    total: Tensor | None
    shard: Tensor
    grad: Tensor | None
    dim: int
    unit: int = 0


@dataclass(frozen=True)
class _Piece:
    """Places of every rank's part of a weight from `start` on, along the dimension of the cut: `size` at most."""

    weight: ShardedWeight
    ranks: int
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Elements of the rank that has most."""
        length = self.weight.whole.shape[self.weight.dim]
        return self.weight.whole.numel() // max(length, 1) * self.size

    def of_all(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's part of a tensor of the whole weight's shape."""
        length = tensor.shape[self.weight.dim]
        part = -(-length // self.ranks)
        ends = [min((rank + 1) * part, length) for rank in range(self.ranks)]
        return [self._narrow(tensor, rank * part + self.start, end) for rank, end in enumerate(ends)]

    def of_mine(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the shard's shape."""
        return self._narrow(tensor, self.start, tensor.shape[self.weight.dim])

    def _narrow(self, tensor: Tensor, start: int, end: int) -> Tensor:
        start = min(start, end)
        return tensor.narrow(self.weight.dim, start, min(self.size, end - start))


class Buffers:
    """Memory of one bucket on its way: all ranks' elements, and this rank's."""

    def __init__(self, elements: int, ranks: int, device: torch.device) -> None:
        # Zeros: what no part fills, where parts are uneven, is sent too, and is to be no signalling NaN.
        self._all = torch.zeros(ranks * elements, dtype=torch.float32, device=device)
        self._mine = torch.zeros(elements, dtype=torch.float32, device=device)

    def take(self, elements: int, ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return [W, C] and [C] elements of a type that is no larger than fp32."""
        return self._all.view(dtype)[: ranks * elements].view(ranks, elements), self._mine.view(dtype)[:elements]


class Bucket:
    """Pieces of weights of one type that travel together: a rank's C elements hold its part of one after another.

    Attributes:
        units: the first and the last of those whose weights they are of.
    """

    def __init__(self, pieces: Sequence[_Piece], group: ProcessGroup) -> None:
        self._pieces, self._group = pieces, group
        self._dtype = pieces[0].weight.whole.dtype
        self.units = pieces[0].weight.unit, pieces[-1].weight.unit
        sizes = [piece.elements for piece in pieces]
        self.elements = sum(sizes)
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def start_gather(self, buffers: Buffers) -> Callable[[], None]:
        """Send this rank's shards to all; returns what waits for those of the others and puts them together."""
        all_WC, mine_C = buffers.take(self.elements, self._group.size(), self._dtype)
        shards = [piece.of_mine(piece.weight.shard) for piece in self._pieces]
        torch._foreach_copy_(self._places(mine_C, shards), shards)
        work = start_gather_into(all_WC.flatten(), mine_C, self._group)

        def finish() -> None:
            work.wait()
            places, parts = self._all_places(all_WC, [piece.of_all(piece.weight.whole) for piece in self._pieces])
            torch._foreach_copy_(parts, places)

        return finish

    def start_reduce(self, buffers: Buffers) -> Callable[[], None]:
        """Send every rank its part of this rank's sums; returns what waits for this rank's, and takes the mean."""
        all_WC, mine_C = buffers.take(self.elements, self._group.size(), torch.float32)
        places, parts = self._all_places(all_WC, [piece.of_all(piece.weight.total) for piece in self._pieces])
        torch._foreach_copy_(places, parts)
        work = start_scatter_sum_into(mine_C, all_WC.flatten(), self._group)

        def finish() -> None:
            work.wait()
            mine_C.div_(self._group.size())
            grads = [piece.of_mine(piece.weight.grad) for piece in self._pieces]
            torch._foreach_copy_(grads, self._places(mine_C, grads))

        return finish

    def _places(self, flat_C: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Where one rank's parts, which have the shapes of `like`, lie among its elements."""
        return [flat_C[start:][: part.numel()].view(part.shape) for start, part in zip(self._starts, like, strict=True)]

    def _all_places(self, all_WC: Tensor, cut: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Where all ranks' parts of every piece lie, and the parts in the same order."""
        places, parts = [], []
        for rank, flat_C in enumerate(all_WC):
            mine = [pieces[rank] for pieces in cut]
            places += self._places(flat_C, mine)
            parts += mine
        return places, parts


def fill_buckets(weights: Sequence[ShardedWeight], group: ProcessGroup) -> list[Bucket]:
    """Share weights out to buckets of one type, in their order; a bucket has one piece of one at least."""
    ranks = group.size()
    found: list[list[_Piece]] = []
    room = 0
    for piece in (piece for weight in weights for piece in _pieces(weight, ranks)):
        size = piece.elements * ranks
        if not found or size > room or found[-1][0].weight.whole.dtype != piece.weight.whole.dtype:
            found.append([])
            room = BUCKET_ELEMENTS
        found[-1].append(piece)
        room -= size
    return [Bucket(pieces, group) for pieces in found]


def _pieces(weight: ShardedWeight, ranks: int) -> Iterator[_Piece]:
    """Cut a weight into pieces that fit a bucket, each as long as the largest rank's part allows."""
    length = weight.whole.shape[weight.dim]
    part = -(-length // ranks)
    step = max(1, BUCKET_ELEMENTS // ranks // max(1, weight.whole.numel() // max(length, 1)))
    for start in range(0, part, step):
        yield _Piece(weight, ranks, start, min(step, part - start))

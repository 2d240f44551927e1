"""The call that all token mixers have in common, and how their heads are split over ranks.

Legend: T tokens, D model width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable


@dataclass(frozen=True)
class HeadShard:
    """The part of a mixer's heads that one rank works on: H / ranks consecutive ones.

    Attributes:
        rank: which part.
        ranks: into how many parts the heads are cut.
        reduce: replaces a tensor by its sum over the ranks, in place and unseen by autograd, and returns it.
    """

    rank: int
    ranks: int
    reduce: Callable[[Tensor], Tensor]

    def of(self, heads: int) -> slice:
        """Return which of so many heads are this rank's; `ranks` divides their number."""
        count = heads // self.ranks
        return slice(self.rank * count, (self.rank + 1) * count)


class Mixer(Protocol):
    """A module that lets the tokens of a document see the earlier ones of the same document."""

    def __call__(self, x_TD: Tensor, packing: Packing, rope: RopeTable, cache: Any = None) -> Tensor:
        """Mix tokens of the same document; x and result are [T, D].

        Where its heads were split, the result is this rank's part of a sum over ranks.

        Args:
            x_TD: any float dtype, that of the weights.
            packing: the documents that the tokens belong to.
            rope: cosines and sines of the tokens' positions; a mixer may do without.
            cache: what the `batch_cache` of the mixer's :class:`~mmtrain.model.mixers.registry.MixerSpec` gives of
                documents that the tokens continue; brought up to date. None: the documents of `packing` are whole.
        """

    def split_heads(self, shard: HeadShard) -> None:
        """Work from now on with this rank's heads alone; the parameters are split by the spec's placements."""

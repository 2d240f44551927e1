"""Which rank looks at which tiles, by arithmetic on the host that every rank does alike.

The tiles of all rows stand in one order: by the ranks' rows, then as the rows name them. Each rank has an equal
contiguous part of it, in the order of the ranks. Where rows have about as many tiles, most parts are thus of a rank's
own rows, and do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TileShares:
    """Shares of the tiles of a micro-batch on every rank.

    Attributes:
        first: int64 [replicas + 1], the first tile of each replica's rows, then the number of all tiles.
        bounds: int64 [ranks + 1], the first tile of each rank's share, then the number of all tiles.
        sharers: consecutive ranks that have the same rows, and all tiles of them.
    """

    first: np.ndarray
    bounds: np.ndarray
    sharers: int

    @staticmethod
    def of(counts: Sequence[int], sharers: int) -> TileShares:
        """Share out tiles evenly.

        Args:
            counts: tiles of each replica's rows.
            sharers: ranks that have the same rows; there are as many for each replica.
        """
        first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        ranks = len(counts) * sharers
        return TileShares(first, np.arange(ranks + 1, dtype=np.int64) * first[-1] // ranks, sharers)

    @property
    def total(self) -> int:
        """All tiles."""
        return int(self.first[-1])

    def size(self, rank: int) -> int:
        """Tiles that a rank looks at."""
        return int(self.bounds[rank + 1] - self.bounds[rank])

    def part(self, rank: int, replica: int) -> tuple[int, int]:
        """Tiles of a replica's rows that a rank looks at: the first and the one behind the last, among the replica's.

        Both are the same where it looks at none.
        """
        begin = max(self.bounds[rank], self.first[replica])
        end = max(begin, min(self.bounds[rank + 1], self.first[replica + 1]))
        return int(begin - self.first[replica]), int(end - self.first[replica])

    def sender(self, rank: int, replica: int) -> int:
        """The rank that sends a replica's tiles to a rank that has not its rows; sharers take turns."""
        return replica * self.sharers + rank % self.sharers

    @property
    def stay(self) -> bool:
        """Whether every rank has all tiles of its share already, so that none moves."""
        return bool((self.bounds[:: self.sharers] == self.first).all())

    def sent(self, rank: int) -> list[tuple[int, int]]:
        """What a rank sends to every rank: parts of its replica's tiles, as :meth:`part` has them."""
        own = rank // self.sharers
        return [
            self.part(other, own) if other // self.sharers != own and self.sender(other, own) == rank else (0, 0)
            for other in range(len(self.bounds) - 1)
        ]

    def received(self, rank: int) -> list[int]:
        """Number of tiles that a rank gets from every rank; those of its own replica it has."""
        sizes = [0] * (len(self.bounds) - 1)
        for replica in range(len(self.first) - 1):
            if replica != rank // self.sharers:
                begin, end = self.part(rank, replica)
                sizes[self.sender(rank, replica)] = end - begin
        return sizes

    def owner(self, tile_M: np.ndarray) -> np.ndarray:
        """Which rank looks at each of some tiles, given by their numbers in the order of all, int64."""
        return np.searchsorted(self.bounds, tile_M, side="right") - 1


@dataclass(frozen=True)
class WantedPatches:
    """Tokens of images on this rank, ordered by the rank that looks at their tiles; newlines, which need none, last.

    Attributes:
        row_M: int64 on the host, the row of each patch among those of the rank that looks at it, Q a tile.
        counts: number of patches from every rank.
        at_J: int64 on the host, the place of each token among this rank's.
        newlines: number of them.
    """

    row_M: Tensor
    counts: list[int]
    at_J: Tensor
    newlines: int

    @staticmethod
    def of(source_J: Tensor, at_J: Tensor, tile_tokens: int, shares: TileShares, replica: int) -> WantedPatches:
        """Find who looks at the patches of tokens.

        Args:
            source_J: int64, which of the tokens of the replica's tiles each is, Q a tile; -1 is a newline.
            at_J: its place.
            tile_tokens: Q.
            shares: of the micro-batch.
            replica: whose rows they are of.
        """
        patch_J = source_J >= 0
        row_M = source_J[patch_J].numpy() + shares.first[replica] * tile_tokens
        owner_M = shares.owner(row_M // tile_tokens)
        order_M = np.argsort(owner_M, kind="stable")
        local_M = (row_M - shares.bounds[owner_M] * tile_tokens)[order_M]
        counts = np.bincount(owner_M, minlength=len(shares.bounds) - 1).tolist()
        places = [at_J[patch_J][torch.from_numpy(order_M)], at_J[~patch_J]]
        return WantedPatches(torch.from_numpy(local_M), counts, torch.cat(places), len(places[1]))

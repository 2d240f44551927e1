"""The eyes' work of a micro-batch, shared out over the ranks that train its rows, whatever images fell to which rows.

Tiles know nothing of each other, so any rank can look at any. Three exchanges: uint8 tiles to the ranks that look at
them, places of the patches that each rank goes on with, and the features of exactly those, as wide as the vision
transformer, not as the text model. The projector and the newlines are the work of the rank that has the token.

Gradients of the eyes are sums over all these ranks, as those of all replicated weights: FSDP's mean over replicas, and
the sum over tp that a DTensor's partial gradients ask for.

Legend: N tiles of this rank's rows, n of its share, S pixels of a tile's side, Q tokens of a tile, W width of the
vision transformer, M patches among the J tokens of images on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.packed_seq import to_device
from mmtrain.parallel.collectives import exchange_into, exchange_rows
from mmtrain.parallel.vision.tile_shares import TileShares, WantedPatches
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import source_of_tokens


@dataclass(frozen=True)
class Lookers:
    """Ranks that look at images together, in the order of their rows.

    Attributes:
        group: of their devices.
        host: the same ranks, for numbers in host memory: no device is waited for.
        sharers: consecutive ranks that have the same rows, by context and tensor parallelism.
    """

    group: ProcessGroup
    host: ProcessGroup
    sharers: int

    @property
    def replica(self) -> int:
        """Which rows this rank has."""
        return self.group.rank() // self.sharers

    def gather_counts(self, tiles: int) -> list[int]:
        """Return the number of tiles of every replica's rows; collective."""
        if self.group.size() == self.sharers:
            return [tiles]
        counts_R = torch.empty(self.group.size(), dtype=torch.int64)
        dist.all_gather(list(counts_R.split(1)), torch.tensor([tiles]), group=self.host)
        return counts_R[:: self.sharers].tolist()

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Return what every rank has for this one, given what this one has for every rank; collective."""
        if self.group.size() == 1:
            return list(counts)
        theirs = torch.empty(len(counts), dtype=torch.int64)
        dist.all_to_all_single(theirs, torch.tensor(counts), group=self.host)
        return theirs.tolist()


class SharedImageWork:
    """An `ImageWork` of several ranks, each of which looks at an equal share of the tiles; collective over them.

    A rank without tiles looks at one grey tile, of which nobody wants anything: hooks, gradients and exchanges of all
    ranks stay in step, and its gradient is zero.

    Args:
        lookers: the ranks.
        always: look at a grey tile in training where no rank has an image too, as FSDP's hooks need: gradients that
            earlier micro-batches of a step left are reduced in the backward pass of its last one.

    Attributes:
        tiles_seen: number of tiles that this rank has looked at in training.
    """

    def __init__(self, lookers: Lookers, always: bool) -> None:
        self._lookers, self._always = lookers, always
        self.tiles_seen = 0

    def __call__(self, encoder: ImageEncoder, given: ImageInputs) -> GivenEmbeddings | None:
        """Return the embeddings of this rank's tokens; None, on all ranks, where none has an image.

        Raises:
            ConfigError: the tiles are not those that the images have.
        """
        given.images.check(encoder.config)
        tiles_N3SS, training = given.images.tiles_N3SS, torch.is_grad_enabled()
        shares = TileShares.of(self._lookers.gather_counts(len(tiles_N3SS)), self._lookers.sharers)
        if not shares.total and not (training and self._always):
            return None
        mine_n3SS = self._own_share(tiles_N3SS, shares)
        self.tiles_seen += len(mine_n3SS) if training else 0
        if not len(mine_n3SS):
            mine_n3SS = tiles_N3SS.new_full((1, *tiles_N3SS.shape[1:]), 128)
        x_nQW = encoder.features(mine_n3SS)
        source_J = source_of_tokens(given.images.layouts)[given.token_J]
        wanted = WantedPatches.of(source_J, given.at_J, x_nQW.shape[1], shares, self._lookers.replica)
        rows_JD = encoder.join(self._fetch(x_nQW.flatten(0, 1), wanted), wanted.newlines)
        return GivenEmbeddings(to_device(wanted.at_J, rows_JD.device), rows_JD)

    def _own_share(self, tiles_N3SS: Tensor, shares: TileShares) -> Tensor:
        """Tiles that this rank looks at, [n, 3, S, S], uint8, in their order."""
        rank, replica = self._lookers.group.rank(), self._lookers.replica
        begin, end = shares.part(rank, replica)
        own = tiles_N3SS[begin:end]
        if shares.stay:
            return own
        receive, sent = shares.received(rank), shares.sent(rank)
        out = tiles_N3SS.new_empty((sum(receive), *tiles_N3SS.shape[1:]))
        moved = torch.cat([tiles_N3SS[a:b] for a, b in sent])
        exchange_into(out, moved, receive, [b - a for a, b in sent], self._lookers.group)
        before = sum(receive[: replica * shares.sharers])
        return torch.cat([out[:before], own, out[before:]]) if len(own) else out

    def _fetch(self, rows_PW: Tensor, wanted: WantedPatches) -> Tensor:
        """Features [M, W] of the patches that this rank wants, given those [n Q, W] that it has."""
        group, row_M = self._lookers.group, to_device(wanted.row_M, rows_PW.device)
        give = self._lookers.swap_counts(wanted.counts)
        asked = row_M.new_empty(sum(give))
        exchange_into(asked, row_M, give, wanted.counts, group)
        return exchange_rows(rows_PW.index_select(0, asked), wanted.counts, give, group)

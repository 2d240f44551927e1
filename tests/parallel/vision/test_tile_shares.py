"""Shares of tiles: every tile has one rank that looks at it, which gets it from one that has it."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
import torch

from mmtrain.parallel.vision.tile_shares import TileShares, WantedPatches


@pytest.mark.parametrize("seed", range(30))
def test_every_tile_comes_to_one_rank_in_order(seed: int) -> None:
    draw = random.Random(seed)
    replicas, sharers = draw.randint(1, 4), draw.randint(1, 4)
    counts = [draw.choice([0, 0, 1, 5, 19, 40]) for _ in range(replicas)]
    shares, ranks = TileShares.of(counts, sharers), replicas * sharers
    tiles = [[(replica, number) for number in range(count)] for replica, count in enumerate(counts)]
    sizes = [shares.size(rank) for rank in range(ranks)]
    assert sum(sizes) == shares.total == sum(counts) and max(sizes) - min(sizes) <= 1
    seen = []
    for rank in range(ranks):
        got = []
        for sender in range(ranks):
            begin, end = shares.sent(sender)[rank]
            assert shares.received(rank)[sender] == end - begin
            if sender == rank:
                assert begin == end, "a rank sends itself nothing"
                a, b = shares.part(rank, rank // sharers)
                before = sum(shares.received(rank)[: rank // sharers * sharers])
                assert before == len(got)
                got += tiles[rank // sharers][a:b]
            got += tiles[sender // sharers][begin:end]
            assert begin == end or sender // sharers != rank // sharers, "tiles that a rank has do not move"
        seen += [sorted(got)]
    assert list(chain(*seen)) == list(chain(*tiles))
    assert shares.stay is all(shares.received(rank) == [0] * ranks for rank in range(ranks))


def test_ranks_that_share_all_rows_move_nothing() -> None:
    assert TileShares.of([7], 4).stay
    assert not TileShares.of([7, 0], 2).stay
    assert TileShares.of([4, 4], 2).stay


@pytest.mark.parametrize("seed", range(10))
def test_patches_are_asked_of_the_rank_that_looks_at_their_tile(seed: int) -> None:
    draw = np.random.default_rng(seed)
    counts, sharers, per_tile = draw.integers(0, 6, 3).tolist(), 2, 5
    counts[1] += 1
    shares, replica = TileShares.of(counts, sharers), 1
    source_J = torch.from_numpy(draw.permutation(counts[1] * per_tile))
    source_J[draw.random(len(source_J)) < 0.3] = -1
    at_J = torch.arange(len(source_J)) * 3
    wanted = WantedPatches.of(source_J, at_J, per_tile, shares, replica)
    assert wanted.newlines == int((source_J < 0).sum())
    rows = torch.split(wanted.row_M, wanted.counts)
    found = [
        (shares.bounds[rank] - shares.first[replica]) * per_tile + row
        for rank, some in enumerate(rows) for row in some.tolist()
    ]  # fmt: skip
    assert all(0 <= row < shares.size(rank) * per_tile for rank, some in enumerate(rows) for row in some.tolist())
    places = dict(zip(wanted.at_J.tolist(), [*found, *[-1] * wanted.newlines], strict=True))
    assert places == dict(zip(at_J.tolist(), source_J.tolist(), strict=True))

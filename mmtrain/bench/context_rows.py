"""Packed rows that context parallelism is measured on: lengths drawn from a seed, and rows cut for a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard

# Share of the tokens, shortest and longest document: the shares are MiniMax-01's (table 6), lengths inside a bucket are
# log-uniform, which is ours.
MIXTURES = {
    "128K": ((0.3, 256, 2**15), (0.7, 2**15, 2**17)),
    "512K": ((0.35, 256, 2**15), (0.35, 2**15, 2**17), (0.3, 2**17, 2**19)),
    "1M": ((0.3, 256, 2**15), (0.3, 2**15, 2**17), (0.4, 2**17, 2**20)),
}
PART = 4
"""A row has no document longer than this part of it, in the measurements of attention alone."""


def short_documents(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths that fill a row, log-uniform from 1/64 to 1/4 of it; the last one is what is left."""
    return _fill(tokens, ((1.0, max(tokens // 64, 1), tokens // PART),), seed)


def mixture(tokens: int, name: str, seed: int) -> tuple[int, ...]:
    """Lengths that fill a row of one of :data:`MIXTURES`; a document longer than the room that is left is cut."""
    return _fill(tokens, MIXTURES[name], seed)


def _fill(tokens: int, buckets: Sequence[tuple[float, int, int]], seed: int) -> tuple[int, ...]:
    rng = np.random.default_rng(seed)
    # A share of the tokens becomes a share of the documents by the mean length of a log-uniform bucket.
    mean = np.array([(high - low) / np.log(high / low) for _, low, high in buckets])
    chance = np.array([share for share, _, _ in buckets]) / mean
    lengths: list[int] = []
    left = tokens
    while left:
        _, low, high = buckets[rng.choice(len(buckets), p=chance / chance.sum())]
        lengths.append(min(int(np.exp(rng.uniform(np.log(low), np.log(high)))), left))
        left -= lengths[-1]
    return tuple(lengths)


def first_tokens(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The first documents of a row, as many as have so many tokens; the last is cut."""
    kept: list[int] = []
    for length in lengths:
        kept.append(min(length, tokens - sum(kept)))
        if sum(kept) == tokens:
            break
    return tuple(kept)


def heaviest(lengths: Sequence[int], tokens: int, most_pairs: float) -> tuple[int, ...]:
    """The longest documents of a row, with at most so many tokens and about so many pairs; what does not fit is cut."""
    kept: list[int] = []
    for length in sorted(lengths, reverse=True):
        length = min(length, tokens, int(math.sqrt(2 * most_pairs)))
        if length < 1:
            break
        kept.append(length)
        tokens, most_pairs = tokens - length, most_pairs - length * length / 2
    return tuple(kept) or (1,)


def pairs(lengths: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(n * (n + 1) // 2 for n in lengths)


def cut_row(
    lengths: Sequence[int], ranks: int, rank: int, table: str, chunks: int, device: torch.device
) -> ContextPacking:
    """A rank's part of a row, with `chunks` chunks on each rank."""
    shard = RowShard.plan(tuple(lengths), chunks * ranks, ranks, rank, table)
    return ContextPacking.cut(Packing.from_lengths(list(lengths), device), shard)

"""Ownership tables and cuts of a row, against a token-by-token reading of them."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from mmtrain.config import ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.parallel.context.cut import RowCutter
from mmtrain.parallel.context.ownership import TABLES, causal_work, imbalance
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard
from mmtrain.parallel.context.softmax_cp import WAYS

SHARES = {"128K": ((0.3, 2**8, 2**15), (0.7, 2**15, 2**17)),
          "1M": ((0.3, 2**8, 2**15), (0.3, 2**15, 2**17), (0.4, 2**17, 2**20))}  # fmt: skip


def draw(rng: random.Random, tokens: int) -> tuple[int, ...]:
    """Documents of lengths that fill a row, some empty."""
    lengths, used = [], 0
    while used < tokens:
        lengths.append(min(rng.choice([0, 1, 2, 3, 5, 11, tokens]), tokens - used))
        used += lengths[-1]
    return tuple(lengths)


def long_row(rng: np.random.Generator, stage: str) -> np.ndarray:
    """Offsets of a row with a stage's shares of lengths (FACTS 3.2), log-uniform inside of a bucket."""
    shares = SHARES[stage]
    means = [(hi - lo) / np.log(hi / lo) for _, lo, hi in shares]
    chance = np.array([share / mean for (share, *_), mean in zip(shares, means, strict=True)])
    tokens, lengths = shares[-1][2], [0]
    while sum(lengths) < tokens:
        _, lo, hi = shares[rng.choice(len(shares), p=chance / chance.sum())]
        lengths.append(min(int(np.exp(rng.uniform(np.log(lo), np.log(hi)))), tokens - sum(lengths)))
    return np.cumsum(lengths)


@pytest.mark.parametrize("seed", range(40))
def test_a_shard_says_how_documents_run_from_chunk_to_chunk(seed: int) -> None:
    rng = random.Random(seed)
    chunks, size, ranks = rng.choice([4, 8, 16]), rng.choice([1, 2, 5, 7]), rng.choice([2, 4])
    lengths = draw(rng, chunks * size)
    document_T = np.repeat(np.arange(len(lengths)), lengths)
    planner = rng.choice(list(TABLES))
    shards = [RowShard.plan(lengths, chunks, ranks, rank, planner) for rank in range(ranks)]
    assert sorted(chunk for shard in shards for chunk in shard.chunks) == list(range(chunks))
    assert {len(shard.chunks) for shard in shards} == {chunks // ranks}
    for c in range(chunks):
        begin, end = c * size, (c + 1) * size
        mine = document_T[begin:end]
        start = np.flatnonzero(document_T == mine[0])[0]
        head = (mine == mine[0]).sum() if start < begin else 0
        tail = (mine == mine[-1]).sum() if end < len(document_T) and document_T[end] == mine[-1] else 0
        found = [(s.start_M[c], s.head_M[c], s.tail_M[c], s.through_M[c]) for s in shards]
        assert found == [(start, head, tail, head == tail == size)] * ranks
    for shard in shards:
        pieces = [np.unique(document_T[c * size : (c + 1) * size], return_counts=True)[1] for c in shard.chunks]
        assert shard.piece_lengths == tuple(np.concatenate(pieces))
    assert shards[0].crosses == any(shards[0].head_M)


@pytest.mark.parametrize("seed", range(10))
def test_work_is_the_pairs_that_queries_see(seed: int) -> None:
    rng = random.Random(seed)
    lengths = draw(rng, 24)
    document_T = np.repeat(np.arange(len(lengths)), lengths)
    seen_T = [(document_T[: t + 1] == document_T[t]).sum() for t in range(24)]
    found = causal_work(np.concatenate([[0], np.cumsum(lengths)]), 6)
    assert found.tolist() == np.array(seen_T).reshape(6, 4).sum(1).tolist()


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("stage", SHARES)
def test_balanced_work_is_even_and_zigzags_is_not(stage: str, ranks: int) -> None:
    """The goal: at most 1.02 on the mixtures of the 128K and 1M stages."""
    rng, even, zigzag = np.random.default_rng(0), [], []
    for _ in range(20):
        offsets = long_row(rng, stage)
        work_M, wide_M = causal_work(offsets, 8 * ranks), causal_work(offsets, 2 * ranks)
        even.append(imbalance(work_M, TABLES["balanced"](work_M, ranks)))
        zigzag.append(imbalance(wide_M, TABLES["zigzag"](wide_M, ranks)))
    assert max(even) < 1.02
    assert np.mean(zigzag) > 1.3


def test_a_row_that_is_even_already_keeps_neighbours_together() -> None:
    work_M = causal_work(np.arange(0, 65, 4), 16)
    assert TABLES["balanced"](work_M, 4) == TABLES["contiguous"](work_M, 4)


def test_zigzag_is_the_usual_one_with_two_chunks_a_rank() -> None:
    assert TABLES["zigzag"](np.ones(8), 4) == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert TABLES["zigzag"](np.ones(6), 2) == ((0, 2, 5), (1, 3, 4))


def test_a_micro_batch_is_cut_into_the_tokens_of_each_rank() -> None:
    lengths = [5, 0, 9, 10, 3, 5]
    whole = Packing.from_lengths(lengths)
    real = RealTokens.from_rows([14, 11], 16)
    whole = Packing(whole.cu_seqlens, whole.position_ids_T, whole.max_seqlen, whole.lengths, real)
    batch = ModelInputs(torch.arange(32), whole, torch.arange(100, 132), 1e4)
    parts = [RowCutter(2, rank, ParallelConfig(cp=2, cp_chunks=4))(batch) for rank in range(2)]
    tokens = torch.cat([part.tokens_T for part in parts])
    assert sorted(tokens.tolist()) == list(range(32))
    for part in parts:
        packing = part.packing
        assert isinstance(packing, ContextPacking)
        assert torch.equal(part.labels_T, part.tokens_T + 100)
        assert torch.equal(packing.index_S, part.tokens_T)
        assert torch.equal(packing.position_ids_T, whole.position_ids_T[part.tokens_T])
        assert packing.cu_seqlens.diff().tolist() == list(packing.lengths)
        assert sum(packing.lengths) == 16
        assert (packing.row_tokens, packing.real_lengths) == (32, whole.real_lengths)
        assert torch.equal(tokens.view(8, 4)[packing.place_M].flatten(), torch.arange(32)), "gathered, then in order"
    assert RowCutter(1, 0, ParallelConfig())(batch) is batch


def test_options_name_the_tables_and_ways_that_there_are() -> None:
    """The configuration does not import what it configures."""
    allowed = {one.name: set(one.metadata.get("one_of", ())) for one in fields(ParallelConfig)}
    assert (allowed["cp_table"], allowed["cp_softmax"]) == (set(TABLES), set(WAYS))

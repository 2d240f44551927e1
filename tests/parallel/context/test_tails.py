"""Tails that softmax attention moves, against the definition: pairs of a query and a key, one by one."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest

from mmtrain.parallel.context.ownership import TABLES, Table
from mmtrain.parallel.context.row_shard import RowShard
from mmtrain.parallel.context.tail_plan import TailPlan

ROWS = [
    [48],
    [6] * 8,
    [1] * 48,
    [5, 0, 31, 0, 12],
    [0, 7, 11, 1, 29],
    [3] * 16,
    [36, 12],
    [47, 1],
    [1, 47, 0],
    [13, 6, 29],
]


def tables(chunks: int, ranks: int) -> list[Table]:
    """The three planners' (of even work) and random ones."""
    found = [planner(np.ones(chunks, np.int64), ranks) for planner in TABLES.values()]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(chunks).reshape(ranks, -1)
        found.append(tuple(tuple(sorted(map(int, row))) for row in order))
    return found


def plans(lengths: list[int], table: Table) -> list[TailPlan]:
    cu_seqlens = np.array([0, *accumulate(lengths)], dtype=np.int64)
    return [TailPlan.of(RowShard.of_table(cu_seqlens, table, rank)) for rank in range(len(table))]


def tokens_of(plan: TailPlan) -> np.ndarray:
    """Places in the row of this rank's tokens."""
    size = plan.shard.chunk_tokens
    return np.concatenate([np.arange(c * size, (c + 1) * size) for c in plan.shard.chunks])


def tail_tokens(plan: TailPlan, chunk: int) -> np.ndarray:
    """Places in the row of a chunk's tail."""
    end = (chunk + 1) * plan.shard.chunk_tokens
    return np.arange(end - plan.shard.tail_M[chunk], end)


def seen_pairs(lengths: list[int]) -> np.ndarray:
    """Whether a query sees a key, [T, T]."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    return (document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)


@pytest.mark.parametrize(("chunks", "ranks"), [(8, 4), (8, 2), (4, 4), (8, 1), (16, 4), (12, 3)])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_parts_and_rectangles_are_each_pair_once(lengths: list[int], chunks: int, ranks: int) -> None:
    """Keys of the all-gather's buffer, and those of the ring's, step by step."""
    for table in tables(chunks, ranks):
        gathered, passed = np.zeros((48, 48), int), np.zeros((48, 48), int)
        ring = plans(lengths, table)
        for plan in ring:
            rows = tokens_of(plan)
            assert sum(plan.lengths) == len(rows) and 0 not in plan.lengths
            for low, high in pairwise([0, *accumulate(plan.lengths)]):
                for found in (gathered, passed):
                    found[np.ix_(rows[low:high], rows[low:high])] += np.tri(high - low, dtype=int)
            needed = np.concatenate([np.empty(0, int), *(tail_tokens(plan, c) for c in plan.needed.chunks)])
            assert len(needed) == plan.needed.tokens <= plan.most_received
            for rectangle in plan.rectangles:
                keys = needed[plan.needed.between(rectangle.first, rectangle.stop)]
                gathered[np.ix_(rows[rectangle.rows], keys)] += 1
                for owner in ring:
                    shared = np.concatenate([np.empty(0, int), *(tail_tokens(plan, c) for c in owner.shared.chunks)])
                    keys = shared[plan.shared_R[owner.rank].between(rectangle.first, rectangle.stop)]
                    passed[np.ix_(rows[rectangle.rows], keys)] += 1
        assert (gathered == seen_pairs(lengths)).all() and (passed == seen_pairs(lengths)).all(), table


@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_ranks_agree_on_messages_and_none_is_idle(lengths: list[int]) -> None:
    for table in tables(8, 4):
        ring = plans(lengths, table)
        received = {(owner, plan.rank, chunk) for plan in ring for owner, run in plan.receives for chunk in run}
        assert received == {(plan.rank, other, chunk) for plan in ring for other, run in plan.sends for chunk in run}
        for owner, other, chunk in received:
            assert owner != other and chunk in table[owner]
            assert any(r.first <= chunk < r.stop for r in ring[other].rectangles)
            assert ring[0].shard.tail_M[chunk] > 0
        for plan in ring:
            order = [(owner, chunk) for owner, run in plan.receives for chunk in run]
            assert order == sorted(set(order))
            assert set(plan.needed.chunks) - set(table[plan.rank]) == {chunk for _, chunk in order}
            for owner, run in plan.receives:  # a message is as long as its slices of both buffers
                assert (plan.rank, run) in ring[owner].sends
                tokens = sum(plan.shard.tail_M[list(run)])
                for tails in (plan.needed, plan.shared_R[owner]):
                    place = tails.between(run[0], run[-1] + 1)
                    assert place.stop - place.start == tokens
            for chunk in plan.shared.chunks:
                assert (tokens_of(plan)[plan.tail_rows(chunk)] == tail_tokens(plan, chunk)).all()
            assert (plan.hops_R, plan.most_shared) == (ring[0].hops_R, ring[0].most_shared)
            needing = {(other - plan.rank) % 4 for owner, other, _ in received if owner == plan.rank}
            assert plan.hops_R[plan.rank] == max(needing, default=0)


def test_documents_that_end_at_edges_need_nothing() -> None:
    for table in tables(8, 4):
        for plan in plans([6, 0, 6, 6, 6, 6, 6, 6, 6], table):
            assert not plan.crosses and plan.steps == 0 and plan.needed.tokens == 0 and not plan.rectangles


def test_neighbouring_chunks_of_a_rank_are_one() -> None:
    contiguous = TABLES["contiguous"](np.ones(8, np.int64), 2)
    first, second = plans([5, 30, 1, 12], contiguous)
    assert first.lengths == (5, 19) and first.rectangles == ()
    assert second.lengths == (11, 1, 12)
    (rectangle,) = second.rectangles
    assert (rectangle.rows, rectangle.first, rectangle.stop) == (slice(0, 11), 0, 4)
    assert second.needed.chunks == (0, 1, 2, 3) and second.needed.offsets == (0, 1, 7, 13, 19)
    assert first.sends == ((1, (0, 1, 2, 3)),) and second.receives == ((0, (0, 1, 2, 3)),) and first.hops_R == (1, 0)
    assert first.most_returned == first.most_received == first.most_shared == 19

"""Softmax attention across ranks against float64 attention of the whole row in one process.

Legend: T tokens of the row, S of a rank, M chunks, R ranks, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.softmax.naive import naive_softmax_attention
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.parallel.context import flights, softmax_gather
from mmtrain.parallel.context.ownership import TABLES, Table, causal_work
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard
from mmtrain.parallel.context.softmax_cp import choose_way, context_softmax, plan_of, varlen_of
from mmtrain.parallel.context.tail_plan import TailPlan
from tests.dist.pool import Pool

T = 96  # of the rows on the CPU
WAYS = ("allgather", "ring", "varlen")
NAMES = ("o", "dq", "dk", "dv")
ROWS = [
    (96,),  # one document on all ranks
    (12,) * 8,  # ends exactly at edges
    (3,) * 32,  # shorter than a chunk
    (1,) * 40 + (2, 0, 54),
    (5, 31, 0, 24, 36),  # two of them end at edges
    (7, 1, 1, 61, 2, 24),  # prime, on many ranks
    (47, 49),
    (0, 20, 0, 1, 75, 0),
    (13, 11, 17, 19, 23, 13),
]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One row and how it is computed."""

    lengths: tuple[int, ...]
    table: Table
    way: str = "allgather"
    heads: tuple[int, int] = (6, 3)
    dtype: torch.dtype = torch.float64
    budget: int = 2**30
    layers: int = 1
    padding: int = 0
    seed: int = 0
    perturb: int | None = None
    width: int = 8


def whole(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole row, alike on all ranks; k and v are no dense tensors."""
    generator = torch.Generator().manual_seed(case.seed)
    H, G = case.heads
    tokens = sum(case.lengths)
    shapes = [(tokens, heads, case.width) for heads in (H, G, G, H)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]
    if case.perturb is not None:
        for x in tensors[:3]:
            x[case.perturb] += 1
    return tensors


def run_cases(cases: list[Case]) -> list[dict[str, object]]:
    """Outputs, gradients and the elements that were sent, of every case on this rank."""
    dist.init_process_group("gloo")
    results = [run_case(case, "cpu") for case in cases]
    dist.barrier()
    return results


def run_case(case: Case, device: str) -> dict[str, object]:
    """Output, gradients, elements sent in forward, messages in all, and dtypes of those received."""
    group = dist.group.WORLD
    cu_seqlens = np.array([0, *accumulate(case.lengths)], dtype=np.int64)
    shard = RowShard.of_table(cu_seqlens, case.table, dist.get_rank())
    packing = Packing.from_lengths(list(case.lengths), device)
    if case.padding:
        packing = replace(packing, real=RealTokens.from_rows([T - case.padding], T))
    packing = ContextPacking.cut(packing, shard)
    q, k, v, do = (x.to(device).index_select(0, packing.index_S) for x in whole(case))
    fused = torch.cat([q, k, v], dim=1).requires_grad_()  # as a projection gives them: strided views
    sizes = [q.shape[1], k.shape[1], v.shape[1]]
    sent: list[int] = []
    dtypes: list[torch.dtype] = []
    start = flights.dist.batch_isend_irecv

    def count(messages: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(m.tensor.numel() for m in messages if m.op is dist.isend)
        dtypes.extend(m.tensor.dtype for m in messages if m.op is dist.irecv)
        return start(messages)

    with mock.patch.object(flights.dist, "batch_isend_irecv", count):
        q, k, v = fused.split(sizes, dim=1)
        o = q
        for _ in range(case.layers):
            o = context_softmax(o, k, v, packing, group, case.way, case.budget)
        forward = sum(sent)
        (grad,) = torch.autograd.grad(o, fused, do)
    tensors = dict(zip(NAMES, (o.detach(), *grad.split(sizes, dim=1)), strict=True))
    assert o.dtype == case.dtype and o.is_contiguous()
    return {**tensors, "forward": forward, "messages": len(sent), "received": dtypes}


def assemble(case: Case, results: list[dict[str, object]]) -> dict[str, Tensor]:
    """The whole row of every rank's results."""
    chunks = torch.tensor([c for mine in case.table for c in mine])
    size = sum(case.lengths) // len(chunks)
    rows = {}
    for name in NAMES:
        parts = torch.cat([result[name] for result in results])
        rows[name] = torch.empty_like(parts)
        rows[name].unflatten(0, (-1, size))[chunks] = parts.unflatten(0, (-1, size))
    return rows


def reference(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """The definition on the whole row."""
    q, k, v, do = (x.to(device).double() for x in whole(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = q
    for _ in range(case.layers):
        o, _ = naive_softmax_attention(o, k, v, torch.tensor([0, *accumulate(case.lengths)]), case.width**-0.5)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do)), strict=True))


def run(pool: Pool, cases: list[Case], ranks: int) -> list[dict[str, Tensor]]:
    """Results of the whole row for every case, which were compared to the definition."""
    by_rank = pool.run(run_cases, cases, world=ranks, timeout=300)
    rows = [assemble(case, list(results)) for case, results in zip(cases, zip(*by_rank, strict=True), strict=True)]
    found: dict[Case, dict[str, Tensor]] = {}
    for case, got in zip(cases, rows, strict=True):
        key = replace(case, table=(), way="", budget=0, padding=0)
        want = found[key] = found.get(key) or reference(case)
        for name in NAMES:
            error = (got[name].double() - want[name]).abs().max().item()
            assert error <= BOUND[case.dtype] * max(1.0, want[name].abs().max().item()), (name, error, case)
    return rows


def tables(lengths: tuple[int, ...], chunks: int, ranks: int, random: int) -> list[Table]:
    work = causal_work(np.array([0, *accumulate(lengths)], dtype=np.int64), chunks)
    found = [planner(work, ranks) for planner in TABLES.values()]
    for seed in range(random):
        order = np.random.default_rng(seed + 17 * sum(lengths[:1])).permutation(chunks).reshape(ranks, -1)
        found.append(tuple(tuple(sorted(map(int, row))) for row in order))
    return list(dict.fromkeys(found))


def all_cases(ranks: int, random: int, rows: list[tuple[int, ...]] = ROWS) -> list[Case]:
    """Every way on every row and table, with chunks of several sizes; heads and budget vary along."""
    heads = [(6, 3), (4, 1), (3, 3), (8, 2)]
    cases = []
    for number, lengths in enumerate(rows):
        chunks = ranks * (2, 4, 1)[number % 3]
        for place, table in enumerate(tables(lengths, chunks, ranks, random)):
            for way in WAYS:
                budget = 1 if place % 2 else 2**30
                cases.append(Case(lengths, table, way, heads[number % 4], budget=budget))
    return cases


def test_every_row_and_table_in_every_way(pool: Pool) -> None:
    run(pool, all_cases(4, random=1), 4)


def test_two_ranks_and_one(pool: Pool) -> None:
    run(pool, all_cases(2, random=1, rows=ROWS[::3]), 2)
    run(pool, [Case(ROWS[5], ((0, 1, 2, 3),), way) for way in (*WAYS, "auto")], 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_more_ranks_and_tables(pool: Pool, ranks: int) -> None:
    run(pool, all_cases(ranks, random=2 if ranks == 8 else 6), ranks)


def test_other_dtypes_layers_and_padding(pool: Pool) -> None:
    table = tables(ROWS[5], 16, 4, 1)[-1]
    cases = []
    for way in WAYS:
        for budget in (1, 2**30):
            case = Case(ROWS[5], table, way, budget=budget)
            cases += [replace(case, dtype=torch.float32), replace(case, dtype=torch.bfloat16)]
            cases += [replace(case, layers=2), replace(case, padding=24), replace(case, way="auto")]
    run(pool, cases, 4)


def test_owners_change_nothing_but_rounding(pool: Pool) -> None:
    for lengths in (ROWS[0], ROWS[5]):
        cases = [Case(lengths, table, way, dtype=torch.float32) for table in tables(lengths, 8, 4, 3) for way in WAYS]
        first, *others = run(pool, cases, 4)
        for other in others:
            for name in NAMES:
                assert (other[name] - first[name]).abs().max() <= 1e-6 * max(1, first[name].abs().max()), name


def test_a_token_changes_no_other_document_and_nothing_earlier(pool: Pool) -> None:
    lengths = ROWS[5]
    places = [0, 8, 9, 40, 69, 72, 95]
    for way in WAYS:
        case = Case(lengths, tables(lengths, 8, 4, 1)[-1], way)
        base, *others = run(pool, [case, *(replace(case, perturb=place) for place in places)], 4)
        offsets = [0, *accumulate(lengths)]
        for place, other in zip(places, others, strict=True):
            end = next(offset for offset in offsets if offset > place)
            begin = max(offset for offset in offsets if offset <= place)
            changed = (other["o"] != base["o"]).flatten(1).any(1)
            assert not changed[:place].any() and not changed[end:].any() and changed[place:end].all()
            for name in NAMES[1:]:
                changed = (other[name] != base[name]).flatten(1).any(1)
                assert not changed[:begin].any() and not changed[end:].any(), name


def test_only_needed_tails_move_and_nothing_where_none_is(pool: Pool) -> None:
    edges = Case((12,) * 8, ((0, 7), (1, 6), (2, 5), (3, 4)))
    results = pool.run(run_cases, [replace(edges, way=way) for way in WAYS], world=4)
    assert all(result["messages"] == 0 for rank in results for result in rank)

    halves, alternate = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))
    number = 2 * 3 * 8  # elements of a token's keys and values
    cases = [Case((16, 40, 40), halves), Case((60, 36), halves, "ring"), Case((10, 9, 77), alternate, layers=2)]
    cases += [replace(case, way="varlen") for case in cases]
    cases += [replace(cases[3], budget=1)]  # keys come again in backward
    first, second = pool.run(run_cases, cases, world=2)
    # The second document has 8 tokens in chunk 1 and 24 in chunks 2 and 3, and goes on in chunk 4 of the other rank.
    assert first[0]["forward"] == (8 + 24) * number and second[0]["forward"] == 0
    assert first[1]["forward"] == 4 * 12 * number and second[1]["forward"] == 0
    # Chunk 0 leaves 2 tokens of the second document to chunk 1, and chunks 1 to 6 leave 5 and 12s of the third.
    assert first[2]["forward"] == 2 * (2 + 3 * 12) * number and second[2]["forward"] == 2 * (5 + 2 * 12) * number
    assert [[case["forward"] for case in rank[3:6]] for rank in (first, second)] == [
        [case["forward"] for case in rank[:3]] for rank in (first, second)
    ]
    assert [(rank[3]["messages"], rank[6]["messages"]) for rank in (first, second)] == [(1, 2), (1, 1)]


def test_gradients_of_several_copies_come_home_in_float32(pool: Pool) -> None:
    once, twice = ((0, 3), (1, 2)), ((0, 2), (1, 3))  # rank 1 needs chunk 0 for one piece, or for two
    cases = [Case((96,), table, "varlen", dtype=torch.bfloat16) for table in (once, twice)]
    owner, _ = pool.run(run_cases, cases, world=2)
    assert [case["received"][-1] for case in owner] == [torch.bfloat16, torch.float32]


def test_auto_takes_one_call_for_short_chunks_and_the_ring_for_memory() -> None:
    def choose(tokens: int, kv_heads: int, budget: int) -> str:
        plan = TailPlan.of(RowShard.of_table(np.array([0, tokens]), tuple((c,) for c in range(8)), 3))
        return choose_way(plan, kv_heads, 128, torch.bfloat16, budget)

    assert choose(8 * 2048, 1, 2**30) == "varlen"
    assert choose(8 * 2049, 1, 2**30) == choose(8 * 2048, 8, 2**26) == "allgather"
    # A head of all needed tails is over the budget, and all heads of one rank's tails are less than that.
    assert choose(1024, 1, 2**10) == "ring"
    # All heads of one rank's are more.
    assert choose(1024, 64, 2**10) == "allgather"


def test_a_little_is_one_group_of_heads() -> None:
    def count(tokens: int, budget: int) -> int:
        plan = TailPlan.of(RowShard.of_table(np.array([0, tokens]), ((0,), (1,)), 0))
        k = torch.empty(tokens // 2, 8, 128, dtype=torch.bfloat16, device="meta")
        return len(softmax_gather.head_groups(plan, k, budget, backward=False))

    assert [count(2**14, 2**30), count(2**20, 2**40), count(2**14, 1)] == [1, 2, 8]


def test_plan_of_one_call() -> None:
    """Chunks of 4 tokens, the documents 1 + 5 + 18: rank 0 has chunks 0, 2 and 5, rank 1 has 1, 3 and 4."""
    shard = RowShard.of_table(np.array([0, 1, 6, 24]), ((0, 2, 5), (1, 3, 4)), 0)
    packing = ContextPacking.cut(Packing.from_lengths([1, 5, 18], "cpu"), shard)
    plan, varlen = packing.planned(plan_of)[0], packing.planned(varlen_of)
    assert varlen is packing.planned(varlen_of)
    assert varlen.documents.queries == (1, 3, 4, 4) and varlen.documents.keys == (1, 3, 6, 18)
    # Rank 1's tails: 2 tokens of chunk 1 (12 and 13 here), then all of chunks 3 and 4.
    own, received = [4, 5, 6, 7], [14, 15, 16, 17, 18, 19, 20, 21]
    want = [0, 1, 2, 3, 12, 13, *own, 12, 13, *own, *received, 8, 9, 10, 11]
    assert varlen.source_B.tolist() == want
    assert varlen.send_index.tolist() == [1, 2, 3, *own] and varlen.sends == ((1, slice(0, 7)),)
    assert varlen.receives == ((1, slice(0, 10)),) and varlen.kept_tails == 14
    assert varlen.copies.further[0][0].tolist() == [0, 1]  # two pieces here have chunk 1's tail
    assert not plan.single and plan.most_keys == 12 + 2 + 14


def test_unknown_ways_and_groups_of_another_size_are_refused(pool: Pool) -> None:
    pool.run(refuse, world=2)


def refuse() -> None:
    dist.init_process_group("gloo")
    case = Case((96,), ((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="way='all': allowed are auto, allgather, ring, varlen"):
        run_case(replace(case, way="all"), "cpu")
    with pytest.raises(ValueError, match="a group of 2 ranks for a row of 4"):
        run_case(replace(case, table=((0,), (1,), (2,), (3,))), "cpu")
    dist.barrier()

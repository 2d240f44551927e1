"""Softmax attention across GPUs through NCCL, in every way, against float64 attention of the whole row."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmkernels.softmax import full_block
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.context.ownership import TABLES, causal_work
from mmtrain.parallel.context.row_shard import ContextPacking, RowShard
from mmtrain.parallel.context.softmax_cp import context_softmax, varlen_of
from tests.dist.pool import Pool
from tests.dist.test_context_softmax import NAMES, Case, assemble, reference, run_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
LENGTHS = (4096,), (500, 0, 1, 1500, 1025, 1070), (100,) * 40 + (96,)
WAYS = ("allgather", "ring", "varlen")
BOUND = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4) as workers:
        yield workers


def cases(ranks: int) -> list[Case]:
    """Rows of 4,096 tokens; two layers show an exchange that another overtakes."""
    found = []
    for lengths in LENGTHS:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).numpy()
        for table in (plan(causal_work(cu_seqlens, 4 * ranks), ranks) for plan in TABLES.values()):
            assert RowShard.of_table(cu_seqlens, table, 0).num_chunks == 4 * ranks
            for way in WAYS:
                for dtype, budget in ((torch.bfloat16, 1), (torch.bfloat16, 2**30), (torch.float32, 2**30)):
                    found.append(Case(lengths, table, way, (4, 2), dtype, budget, layers=2, width=64))
    return found


def join() -> None:
    """Connect the GPUs, and let cuDNN, FlashAttention-2 and the join of both take part in small blocks."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    full_block.LEAST = 256
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    dist.barrier()


def work(cases: list[Case]) -> list[dict[str, object]]:
    """Results of every case, on the host."""
    join()
    results = [run_case(case, "cuda") for case in cases]
    return [{name: x.cpu() if name in NAMES else x for name, x in result.items()} for result in results]


def attend_twice(way: str) -> None:
    """Forward and backward, where the second time, with cuDNN's graphs at hand, the host may not wait."""
    join()
    lengths, ranks = LENGTHS[1], dist.get_world_size()
    whole = Packing.from_lengths(list(lengths), "cuda")
    packings = [ContextPacking.cut(whole, RowShard.plan(lengths, 4 * ranks, ranks, dist.get_rank())) for _ in range(2)]
    tokens = packings[0].shard.num_tokens
    q, k, v, do = (torch.randn(tokens, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for packing, mode in zip(packings, ("default", "error"), strict=True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            context_softmax(*leaves, packing, dist.group.WORLD, way).backward(do)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def same_twice() -> None:
    """Gradients of keys that have up to three copies on a rank are the same in every bit when computed again."""
    join()
    table = ((0, 3, 5, 7), (1, 2, 4, 6))  # one document: no chunk but 2 has a neighbour before it
    shard = RowShard.of_table(np.array([0, 4096]), table, dist.get_rank())
    packing = ContextPacking.cut(Packing.from_lengths([4096], "cuda"), shard)
    assert len(varlen_of(packing).copies.further) == 2
    q, k, v, do = (torch.randn(2048, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2, 4))
    leaves, found = [x.requires_grad_() for x in (q, k, v)], []
    for _ in range(2):
        o = context_softmax(*leaves, packing, dist.group.WORLD, "varlen")
        found.append([o.detach(), *torch.autograd.grad(o, leaves[1:], do)])
    assert all(map(torch.equal, *found))


def test_gradients_of_keys_are_the_same_again(pool: Pool) -> None:
    pool.run(same_twice, world=2)


def test_outputs_and_gradients(pool: Pool) -> None:
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    given = cases(ranks)
    by_rank = pool.run(work, given, world=ranks, timeout=600)
    for case, results in zip(given, zip(*by_rank, strict=True), strict=True):
        got, want = assemble(case, list(results)), reference(case, "cuda")
        for name in NAMES:
            error = (got[name].cuda().double() - want[name]).norm() / want[name].norm()
            assert error <= 2 * BOUND[case.dtype], (name, error, case)


@pytest.mark.parametrize("way", WAYS)
def test_the_host_never_waits(pool: Pool, way: str) -> None:
    pool.run(attend_twice, way, world=2)

"""Lightning attention over ranks that share a row, on every rank against the recurrence of the whole row in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkernels.lightning.naive import naive_lightning_attention
from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.context.lightning_cp import begin_context_lightning
from mmtrain.parallel.context.peer_states import PeerStates
from mmtrain.parallel.context.state_exchange import StateExchange
from tests.dist.context_rows import ROWS, TOKENS, filled, packing_of, table_of
from tests.dist.pool import Pool

SLOPES = torch.tensor([1.0, 0.004, 0.0, 0.3])
WIDTH = 4
TABLE_NAMES = ("balanced", "zigzag", "contiguous", "random 1", "random 2")


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Projection [T, H, 3K] of the whole row, and the gradient of the output [T, H, K]."""
    generator = torch.Generator().manual_seed(5)
    heads = len(SLOPES)
    return (torch.randn(TOKENS, heads, 3 * WIDTH, generator=generator).to(dtype),
            torch.randn(TOKENS, heads, WIDTH, generator=generator).to(dtype))  # fmt: skip


def reference(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    qkv, do = inputs(torch.float64)
    qkv.requires_grad_()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    q, k, v = F.silu(qkv)[None].chunk(3, -1)
    o, _ = naive_lightning_attention(q, k, v, SLOPES.double(), cu_seqlens, None)
    (grad,) = torch.autograd.grad(o[0], qkv, do)
    return o[0].detach(), grad


class ReadDirectly(StateExchange):
    """States out of the other processes' memory, on a CPU too."""

    def _choose(self, device: torch.device) -> None:
        self._peers, self._chosen = PeerStates(self.group, device), True


WAYS = {"collectives": StateExchange, "peers": ReadDirectly}


def run(cases: list[tuple[tuple[int, ...], str]], dtype: torch.dtype, way: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run on every rank: output, gradient and places in the row of this rank's tokens, for each case."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        group, results = dist.group.WORLD, []
        exchange = WAYS[way](group)
        for lengths, name in cases:
            packing = packing_of(lengths, table_of(name, lengths, group.size()), group.rank())
            qkv, do = (x.index_select(0, packing.index_S) for x in inputs(dtype))
            qkv.requires_grad_()
            o = begin_context_lightning(qkv, SLOPES, packing, exchange)()
            (grad,) = torch.autograd.grad(o, qkv, do)
            results.append((o.detach(), grad, packing.index_S))
        exchange.close()
        return results
    finally:
        mesh.stop()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_share_a_row_compute_the_row(
    pool: Pool, way: str, ranks: int, dtype: torch.dtype, tolerance: float
) -> None:
    cases = [(filled(lengths), name) for lengths in ROWS.values() for name in TABLE_NAMES]
    found = pool.run(run, cases, dtype, way, world=ranks)
    for rank, results in enumerate(found):
        for (lengths, name), (o, grad, index_S) in zip(cases, results, strict=True):
            expected_o, expected_grad = (x[index_S] for x in reference(lengths))
            where = f"rank {rank}, {name}, documents {lengths}"
            for x, y in ((o, expected_o), (grad, expected_grad)):
                scale = y.abs().max()
                assert (x - y).abs().max() < tolerance * scale, where


def test_a_chunk_computes_the_same_on_any_rank(pool: Pool) -> None:
    """To the bit: its output, its gradients and those of others do not depend on who has which chunk."""
    lengths = filled(ROWS["span two ranks"])
    found = pool.run(run, [(lengths, name) for name in TABLE_NAMES], torch.float32, "collectives", world=4)
    rows = []
    for case in range(len(TABLE_NAMES)):
        parts = [results[case] for results in found]
        order = torch.cat([index_S for *_, index_S in parts]).argsort()
        rows.append([torch.cat([part[i] for part in parts])[order] for i in (0, 1)])
    for other in rows[1:]:
        assert torch.equal(other[0], rows[0][0])
        assert torch.equal(other[1], rows[0][1])

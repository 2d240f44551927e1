"""Rows read out of other ranks' peer buffers: exchanges of growing size, and ranks that cannot reach each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel import mesh
from mmtrain.parallel.expert.exchange import build_exchange
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.peers.ipc_memory import HostIpcMemory
from mmtrain.parallel.peers.mapping import Unreachable
from tests.dist.layouts import MODEL, Job
from tests.dist.pool import Pool
from tests.dist.test_layouts import check

WIDTH = 6


def mesh_of(parallel: ParallelConfig) -> mesh.ParallelContext:
    return mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL))


def exchange_often() -> bool:
    """Whether every exchange brought this rank's rows of that exchange, with one rank that is late each time."""
    context = mesh_of(ParallelConfig(ep=4))
    buffers, rank = PeerBuffers(context.expert["ep"].get_group(), context.device), context.rank
    right = True
    for number, rows in enumerate([8, 8, 4, 64, 64, 64, 8, 400, 8] * 4):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        if number % 4 == rank:
            torch.randn(400, 400).mm(torch.randn(400, 400))
        staged = buffers.stage(rows, WIDTH, dtype)
        assert buffers.stage(rows, WIDTH, dtype).data_ptr() == staged.data_ptr()  # until the exchange it is one place
        staged.copy_((torch.arange(rows) + 3 * rank + number)[:, None].expand(rows, WIDTH) % 251)
        out = torch.full((rows, WIDTH), float("nan"), dtype=dtype)
        buffers.read(out, used_M=torch.zeros(rows, dtype=torch.int32))
        peer, at = torch.arange(rows) // (rows // 4), torch.arange(rows) % (rows // 4) + rank * (rows // 4)
        right &= torch.equal(out, ((at + 3 * peer + number) % 251)[:, None].expand(rows, WIDTH).to(dtype))
    mesh.stop()
    return right


def test_every_exchange_brings_its_own_rows(pool: Pool) -> None:
    assert all(pool.run(exchange_often, world=4))


def mapped_before_and_after_close() -> tuple[int, int]:
    """Files that this process has mapped while the buffers are open, and then."""
    context = mesh_of(ParallelConfig(ep=4))
    buffers = PeerBuffers(context.expert["ep"].get_group(), context.device)
    buffers.stage(8, WIDTH, torch.float32)
    before = Path("/proc/self/maps").read_text().count("/mmtrain-")
    buffers.close()
    after = Path("/proc/self/maps").read_text().count("/mmtrain-")
    mesh.stop()
    return before, after


def test_closed_buffers_are_unmapped(pool: Pool) -> None:
    assert pool.run(mapped_before_and_after_close, world=4) == [(3 * 4, 0)] * 4  # signals and two buffers of each rank


def fail_on(rank: int) -> str:
    """What a rank says when one of them cannot map a file."""
    context = mesh_of(ParallelConfig(ep=4))
    broken = mock.patch.object(HostIpcMemory, "open", side_effect=OSError("no such device"))
    with broken if dist.get_rank() == rank else mock.patch.dict({}):
        with pytest.raises(Unreachable) as direct:
            PeerBuffers(context.expert["ep"].get_group(), context.device)
        with pytest.raises(ConfigError) as refused:
            build_exchange(context.expert["ep", "etp"], context.dense["tp"].get_group(), context.device,
                           exchange="direct")  # fmt: skip
    mesh.stop()
    return f"{direct.value} | {refused.value}"


def test_all_ranks_give_up_where_one_cannot(pool: Pool) -> None:
    answers = pool.run(fail_on, 2, world=4)
    assert len(set(answers)) == 1 and answers[0].startswith(
        "rank 2: OSError: no such device | parallel.exchange=direct"
    )


def answers(exchange: str, host_ranks: int, options: dict[str, int]) -> str:
    """How rows are exchanged, or the error."""
    context = mesh_of(ParallelConfig(**options))
    axes, tensor = context.expert["ep", "etp"], context.dense["tp"].get_group()
    try:
        with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE=str(host_ranks)):
            call = build_exchange(axes, tensor, context.device, exchange=exchange)
        assert call.peer_reads == (call.exchange_reason == "direct")
        return call.exchange_reason
    except ConfigError as error:
        return str(error)
    finally:
        mesh.stop()


@pytest.mark.parametrize(
    ("exchange", "host_ranks", "options", "answer"),
    [
        ("direct", 4, {"ep": 4}, "direct"),
        ("direct", 4, {"tp": 2, "ep": 2, "etp": 2}, "direct"),
        ("auto", 4, {"ep": 4}, "collectives: there is no GPU"),
        ("auto", 2, {"ep": 4}, "collectives: the 4 ranks of parallel.ep are not all on one host"),
        ("auto", 4, {"etp": 4}, "collectives: parallel.ep=1"),
        ("collectives", 4, {"ep": 4}, "collectives"),
        ("direct", 2, {"ep": 4}, "parallel.exchange=direct: the 4 ranks of parallel.ep are not all on one host; "
                                 "give auto or collectives"),
        ("direct", 4, {"ep": 2, "etp": 2}, "parallel.exchange=direct: rows travel along etp too; "
                                           "give auto or collectives"),
    ],
)  # fmt: skip
def test_how_rows_are_exchanged(
    pool: Pool, exchange: str, host_ranks: int, options: dict[str, int], answer: str
) -> None:
    assert set(pool.run(answers, exchange, host_ranks, options, world=4)) == {answer}


def taken(capacity_factor: float | None, global_router: bool) -> str:
    """How a model's rows are exchanged."""
    parallel = ParallelConfig(ep=4, global_router=global_router)
    context = mesh_of(parallel)
    model = meta_model(replace(MODEL, capacity_factor=capacity_factor))
    apply_parallel(model, context, parallel, torch.float32)
    reason = model.layers[0].ffn.experts.call.exchange_reason
    mesh.stop()
    return reason


def test_rows_of_exact_size_are_never_read(pool: Pool) -> None:
    assert pool.run(taken, None, False, world=4)[0] == pool.run(taken, 0.8, True, world=4)[0] == "collectives"
    assert pool.run(taken, 0.8, False, world=4)[0] == "collectives: there is no GPU"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ep": 4, "activation_checkpoint": True}, marks=pytest.mark.slow),
        {"pp": 2, "ep": 2, "pp_schedule": "zero_bubble"},  # keeps gradients of the inside for later
        pytest.param({"tp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "ep": 2, "pp_schedule": "interleaved", "pp_chunks": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_steps(pool: Pool, options: dict[str, object]) -> None:
    check(pool, Job(parallel=ParallelConfig(exchange="direct", **options), steps=2), 4)

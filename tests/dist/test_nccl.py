"""Layouts over GPUs and NCCL against one GPU: a few steps of the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmkernels.moe import route
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.moe.experts import Experts
from mmtrain.parallel import mesh
from mmtrain.parallel.context.state_exchange import StateExchange
from mmtrain.parallel.expert.exchange import build_exchange
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.layout import plan_layout
from mmtrain.runs.compare import compare
from tests.dist.layouts import MODEL
from tests.dist.pool import free_port
from tests.dist.runs import ROOT, SMALL

GPUS = torch.cuda.device_count()
SLACK = 2**28
LAYOUTS = {
    2: ["1", "2 parallel.reshard_after_forward=false",
        "2 parallel.ep=2 parallel.token_groups=2", "2 parallel.ep=2 parallel.exchange=direct",
        "2 parallel.tp=2", "2 parallel.pp=2", "2 parallel.cp=2",
        "2 parallel.cp=2 parallel.ep=2 parallel.cp_softmax=ring"],
    4: ["1", "4 parallel.reshard_after_forward=false",
        "4 parallel.ep=4 parallel.token_groups=2", "4 parallel.ep=4 parallel.exchange=direct",
        "4 parallel.pp=2 parallel.ep=2", "4 parallel.cp=4 parallel.ep=2",
        "4 parallel.cp=2 parallel.tp=2 model.num_kv_heads=1",
        "4 parallel.tp=2 parallel.ep=2 parallel.etp=2 parallel.token_groups=2 model.num_kv_heads=1"],
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_layouts_train_the_same_model(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [option for option in SMALL if not option.startswith("cluster.device")]
    overrides = [*options, f"data.path={corpus}", "cluster.device=cuda", "model.ffn_hidden_size=32"]
    layouts = LAYOUTS[4 if GPUS >= 4 else 2]
    launcher = ROOT / "launch" / "pretrain.py"
    assert compare(launcher, layouts, overrides, steps=3, tolerance=1e-5) == 0, capsys.readouterr().out


def exchange_often(ranks: int) -> None:
    """Exchanges of growing size between GPUs, each with what it was to bring; some ranks come late."""
    context = mesh.start(ClusterConfig(device="cuda"), plan_layout(ranks, ParallelConfig(ep=ranks), MODEL))
    buffers, rank, width = PeerBuffers(context.expert["ep"].get_group(), context.device), context.rank, 2048
    for number, share in enumerate([8, 8, 4, 64, 64, 1, 8, 400, 8, 3000] * 20):
        if number % ranks == rank:
            torch.cuda._sleep(1_000_000 * (number % 3))
        rows = share * ranks
        row_M = torch.arange(rows, device=context.device)
        staged = buffers.stage(rows, width, torch.float32)
        staged.copy_((row_M + 7 * rank + number)[:, None].expand(rows, width))
        peer_M, at_M = row_M // share, row_M % share + rank * share
        out = torch.full((rows, width), float("nan"), device=context.device)
        buffers.read(out, used_M=row_M.int())
        assert torch.equal(out, (at_M + 7 * peer_M + number)[:, None].expand(rows, width).float()), (number, rank)
    mesh.stop()


def fetch_states_often(ranks: int) -> None:
    """States of growing and shrinking size between GPUs, two exchanges at a time behind products; some come late."""
    context = mesh.start(ClusterConfig(device="cuda"), plan_layout(ranks, ParallelConfig(cp=ranks), MODEL))
    exchange, rank, late = StateExchange(context.dense["cp"].get_group()), context.rank, []
    busy = torch.randn(4096, 4096, device=context.device, dtype=torch.bfloat16)
    for number, chunks in enumerate([8, 8, 1, 3, 8, 16, 2, 16] * 25):
        if number % ranks == rank:
            torch.cuda._sleep(1_000_000 * (number % 3))
        value = torch.arange(chunks * 4 * 128 * 128, device=context.device).float().view(chunks, 4, 128, 128)
        arrive = exchange.start(value + 7.0 * rank + number)
        busy @ busy
        late.append((number, value, arrive))
        if len(late) == 2:
            check_states(*late.pop(0), ranks)
    check_states(*late.pop(0), ranks)
    assert exchange.take_notes() == []  # nothing went by collectives
    exchange.close()
    mesh.stop()


def check_states(number: int, value: torch.Tensor, arrive: Callable[[], torch.Tensor], ranks: int) -> None:
    """An exchange brought the states that every rank gave it."""
    found = arrive()
    assert torch.equal(found, torch.cat([value + 7.0 * peer + number for peer in range(ranks)])), number


def exchange_again(ranks: int) -> None:
    """An exchange that is closed and made anew, in both ways, gives the same bits and keeps no memory."""
    context = mesh.start(ClusterConfig(device="cuda"), plan_layout(ranks, ParallelConfig(ep=ranks), MODEL))
    device, width, experts = context.device, 2048, 8
    axes, tp_group = context.expert["ep", "etp"], context.dense["tp"].get_group()
    torch.manual_seed(context.rank)
    with torch.device(device):
        local = Experts(experts // ranks, width, 128)
        for weight in local.parameters():
            torch.nn.init.normal_(weight, std=0.05)
        x_TD, logits_TE = torch.randn(16384, width), torch.randn(16384, experts)
    plan = route(logits_TE, 2, 4800, "probs")  # 0.3 GB of rows, in each of two buffers
    first, free = None, []
    for exchange in ("direct", "collectives") * 4:
        call = build_exchange(axes, tp_group, device, 1, exchange)
        out = call(local, x_TD, plan).detach()
        first = out if first is None else first
        assert torch.equal(out, first), exchange
        call.close()
        free.append(free_memory(device, at_least=free[1] - SLACK if len(free) > 1 else 0))
    assert min(free[2:]) >= free[1] - SLACK, free  # what the first two load for good, kernels and NCCL's, stays
    mesh.stop()


def lay_out_again(ranks: int) -> None:
    """Layouts one after the other in the same processes, as phases of a run have them."""
    world = mesh.join(ClusterConfig(device="cuda"))
    for sizes in ({}, {"tp": ranks}, {"ep": ranks}, {"cp": ranks}, {"pp": ranks}, {"tp": ranks, "etp": ranks}, {}):
        context = world.lay_out(plan_layout(ranks, ParallelConfig(**sizes), replace(MODEL, num_kv_heads=4)))
        for view in (context.dense, context.expert, context.replicas):
            for axis in view.mesh_dim_names:
                found = torch.ones((), device=context.device)
                dist.all_reduce(found, group=view[axis].get_group())
                assert found.item() == view[axis].size(), (sizes, axis)
        mesh.stop()


def free_memory(device: torch.device, at_least: int) -> int:
    """Bytes free on a GPU, once all ranks are here; NCCL takes a while to give its own back."""
    torch.cuda.empty_cache()
    dist.barrier()
    for _ in range(100):
        free = torch.cuda.mem_get_info(device)[0]
        if free >= at_least:
            break
        time.sleep(0.1)
    return free


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_rows_are_read_from_other_gpus(capfd: pytest.CaptureFixture[str]) -> None:
    _on_all(exchange_often)
    assert "shared CUDA tensors" not in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_states_are_fetched_from_other_gpus(capfd: pytest.CaptureFixture[str]) -> None:
    _on_all(fetch_states_often)
    assert "shared CUDA tensors" not in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_an_exchange_can_be_closed_and_made_again() -> None:
    _on_all(exchange_again)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_layouts_follow_one_another_in_the_same_processes() -> None:
    _on_all(lay_out_again)


def _on_all(work: Callable[[int], None]) -> None:
    ranks = 4 if GPUS >= 4 else 2
    torch.multiprocessing.spawn(_as_rank, (ranks, free_port(), work), ranks)


def _as_rank(rank: int, ranks: int, port: int, work: Callable[[int], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    work(ranks)

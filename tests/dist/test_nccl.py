"""Layouts over GPUs and NCCL against one GPU: a few steps of the same run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.layout import plan_layout
from mmtrain.runs.compare import compare
from tests.dist.layouts import MODEL
from tests.dist.pool import free_port
from tests.dist.runs import ROOT, SMALL

GPUS = torch.cuda.device_count()
LAYOUTS = {
    2: ["1", "2 parallel.ep=2 parallel.token_groups=2", "2 parallel.ep=2 parallel.exchange=direct", "2 parallel.tp=2", "2 parallel.pp=2"],
    4: ["1", "4 parallel.ep=4 parallel.token_groups=2", "4 parallel.ep=4 parallel.exchange=direct",
        "4 parallel.pp=2 parallel.ep=2",
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


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_rows_are_read_from_other_gpus(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = 4 if GPUS >= 4 else 2
    torch.multiprocessing.spawn(_as_rank, (ranks, free_port()), ranks)
    assert "shared CUDA tensors" not in capfd.readouterr().err


def _as_rank(rank: int, ranks: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    exchange_often(ranks)

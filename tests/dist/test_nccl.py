"""Layouts over GPUs and NCCL against one GPU: a few steps of the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtrain.train.compare import compare
from tests.dist.runs import SMALL

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
    assert compare(LAYOUTS[4 if GPUS >= 4 else 2], overrides, steps=3, tolerance=1e-5) == 0, capsys.readouterr().out

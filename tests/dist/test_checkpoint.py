"""A checkpoint whose optimizer state is in another form is refused by name, not by a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.model.init import meta_model
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.checkpoint.dcp import load_checkpoint
from mmtrain.optim.optimizer import build_optimizer
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool, WorkerError


def load_by_group(folder: Path) -> None:
    """Save the optimizer's options by group, as earlier versions did, and load that."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model = apply_parallel(meta_model(MODEL), context, ParallelConfig(), torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        weights, moments = get_state_dict(model.module, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        load_checkpoint(folder, model.module, optimizer)
    finally:
        mesh.stop()


def test_another_form_of_the_optimizer_s_state_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ConfigError: run\.resume=.*in another form.*run\.init_optimizer=false"):
        pool.run(load_by_group, tmp_path / "old", world=1)

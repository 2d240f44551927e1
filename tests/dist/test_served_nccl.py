"""An engine over GPUs and NCCL beside one on a single GPU; its prefill and its decode steps are on two streams."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig
from mmtrain.infer.context.group import ContextParallel
from mmtrain.parallel import mesh
from tests.dist.pool import free_port
from tests.dist.served_context import SCRIPTS, watch_all
from tests.infer.served import served_model
from tests.model.small import relative

GPUS = torch.cuda.device_count()
TOLERANCE = 1e-4  # sums of other kernels and in another order


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_gpus_give_what_one_gpu_gives() -> None:
    ranks = 4 if GPUS >= 4 else 2
    torch.multiprocessing.spawn(serve, (ranks, free_port()), ranks)


def serve(rank: int, ranks: int, port: int) -> None:
    """Run every script on this rank's GPU alone, then over all."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    device = mesh.start(ClusterConfig(device="cuda")).device
    model = served_model().to(device)
    alone = watch_all(model, SCRIPTS, None)
    for cut_tokens in (1, 10):
        together = watch_all(model, SCRIPTS, ContextParallel(dist.group.WORLD, cut_tokens))
        for ours, theirs, (script, _) in zip(together, alone, SCRIPTS, strict=True):
            assert ours.logits.keys() == theirs.logits.keys(), script.__name__
            for row, logits in theirs.logits.items():
                torch.testing.assert_close(ours.logits[row], logits, rtol=0, atol=TOLERANCE)
            for row, states in theirs.states.items():
                for mine, other in zip(ours.states[row], states, strict=True):
                    assert relative(mine, other) < TOLERANCE, script.__name__
    mesh.stop()

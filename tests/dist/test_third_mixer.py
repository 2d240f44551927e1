"""A mixer that only tests register, laid over two processes of tensor parallelism, against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.config import ParallelConfig
from tests.dist.layouts import MODEL, Job, Outcome, alone, train
from tests.dist.pool import Pool
from tests.model.mixers.running_mean import registered


def train_with_the_third(job: Job) -> Outcome:
    """Run on every process of the world."""
    with registered():
        return train(job)


@pytest.mark.slow
def test_two_processes_equal_one(pool: Pool) -> None:
    job = Job(replace(MODEL, num_layers=3, layer_pattern="LMS"), ParallelConfig(tp=2), steps=2)
    one = pool.run(train_with_the_third, alone(job), world=1)[0]
    mine = [name for name in one.before if name.startswith("layers.1.mixer.")]
    assert sorted(mine) == [f"layers.1.mixer.{leaf}" for leaf in ("in_proj.weight", "out_proj.weight", "scale_I")]
    for many in pool.run(train_with_the_third, job, world=2):
        for name, weight in one.before.items():
            assert torch.equal(many.before[name], weight), name
            error = (many.gradients[name] - one.gradients[name]).norm() / one.gradients[name].norm()
            assert error < 1e-4, (name, error)
        assert [r.loss for r in many.results] == pytest.approx([r.loss for r in one.results], rel=1e-5)
        assert many.results[0].flops == pytest.approx(one.results[0].flops)

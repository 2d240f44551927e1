"""Clipping of a laid-out model: every parameter's gradient, on whichever mesh or stage it lies, is scaled alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.gradients import clip_gradients
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ, micro_batch, whole
from tests.dist.pool import Pool

SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")
LARGEST = 0.01


class Clipped(NamedTuple):
    """What became of a whole gradient: its norm before, its share of that, and how far from parallel it is."""

    norm: float
    scale: float
    apart: float


def clipped(parallel: ParallelConfig) -> tuple[float, dict[str, Clipped]]:
    """The global norm as clipping reports it, and this rank's gradients."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, SHALLOW, [SEQ]))
    try:
        model = apply_parallel(meta_model(SHALLOW), context, parallel, torch.float32)
        model.initialise(7)
        batches = [model_inputs(micro_batch(row, 1), 1e4, context.device)
                   for row in range(context.dp_rank, 4, context.dp_size)]  # fmt: skip
        list(model.forward_backward(batches, len(batches), torch.tensor([4 * SEQ])))
        before = whole(model.module, gradient=True)
        norm = clip_gradients(model.module.parameters(), LARGEST)[0].item()
        after = whole(model.module, gradient=True)
        found = {}
        for name, was in before.items():
            scale = (after[name].norm() / was.norm()).item()
            apart = (after[name] - was * scale).norm() / after[name].norm()
            found[name] = Clipped(was.double().norm().item(), scale, apart.item())
        return norm, found
    finally:
        mesh.stop()


@pytest.mark.parametrize(("options", "world"), [({"ep": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "ep": 2}, 2)], ids=str)
def test_every_gradient_is_scaled_by_the_same_factor(pool: Pool, options: dict[str, int], world: int) -> None:
    ranks = pool.run(clipped, ParallelConfig(**options), world=world)
    whole_norm = math.hypot(*{name: one.norm for _, found in ranks for name, one in found.items()}.values())
    for norm, found in ranks:
        assert norm == pytest.approx(whole_norm, rel=1e-6) and norm > 10 * LARGEST
        assert any("experts" in name for name in found) and any("mixer" in name for name in found)
        for name, one in found.items():
            assert one.scale == pytest.approx(LARGEST / norm, rel=1e-4) and one.apart < 1e-5, name

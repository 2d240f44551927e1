"""Clipping of a laid-out model: every parameter's gradient, on whichever mesh or stage it lies, is scaled alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.init import meta_model
from mmtrain.parallel import mesh
from mmtrain.parallel.gradients import clip_gradients
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ, micro_batch, whole
from tests.dist.pool import Pool

SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")
LARGEST = 0.01


def clipped(parallel: ParallelConfig) -> tuple[float, dict[str, tuple[float, float]]]:
    """The norm before, and each gradient's share of its former self: how long, and how far from parallel to it."""
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
        scale = {name: (after[name].norm() / before[name].norm()).item() for name in before}
        apart = {name: (after[name] - before[name] * scale[name]).norm().item() for name in before}
        return norm, {name: (scale[name], apart[name] / after[name].norm().item()) for name in before}
    finally:
        mesh.stop()


@pytest.mark.parametrize(("options", "world"), [({"ep": 2}, 2), ({"pp": 2}, 2), ({"tp": 2, "ep": 2}, 2)], ids=str)
def test_every_gradient_is_scaled_by_the_same_factor(pool: Pool, options: dict[str, int], world: int) -> None:
    for norm, found in pool.run(clipped, ParallelConfig(**options), world=world):
        assert norm > 10 * LARGEST
        assert any("experts" in name for name in found) and any("mixer" in name for name in found)
        for name, (scale, apart) in found.items():
            assert scale == pytest.approx(LARGEST / norm, rel=1e-4) and apart < 1e-5, name

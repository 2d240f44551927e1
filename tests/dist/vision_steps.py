"""Steps of a small model with eyes under any layout, and the same in one process."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from mmdata.images.batch import BatchImage, ImageBatch
from mmdata.images.grid import lay_image
from mmdata.rows.loader import PackedBatch
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig, VisionConfig
from mmtrain.model.frozen import freeze
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step
from mmtrain.vision.images import tile_rules
from tests.dist.layouts import MODEL, SEQ, micro_batch

IMAGE = 100
EYES = VisionConfig(image_token=IMAGE, tile_size=14, patch_size=7, hidden_size=16, num_layers=2, num_heads=2,
                    ffn_hidden_size=24, grids=[[1, 1], [1, 2], [2, 1], [2, 2]])  # fmt: skip
VL = replace(MODEL, num_layers=2, layer_pattern="LS", num_experts=0, vision=EYES)
EXPERTS = replace(VL, num_experts=8)

Shown = tuple[tuple[int, int, int], ...]
"""Images of a row: the place of the first token, width and height in pixels."""

MIXED: tuple[Shown, ...] = (((3, 14, 14), (20, 28, 28)), (), ((0, 28, 14),), ((30, 14, 28),))
"""Of rows over and over: 10 and 28 tokens; none; 14 at the beginning; 16 up to near the end."""


@dataclass(frozen=True)
class VisionJob:
    """Steps of `rows` packed rows with images.

    Attributes:
        shown: images of each row, over and over.
        frozen: patterns of what is not trained.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=lambda: VL)
    shown: tuple[Shown, ...] = MIXED
    rows: int = 4
    steps: int = 1
    frozen: tuple[str, ...] = ()
    lr: float = 0.0
    dtype: torch.dtype = torch.float64


@dataclass
class Seen:
    """What one rank saw: whole gradients of the last step and weights after it, and results."""

    gradients: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    results: list[StepResult]


def show(batch: PackedBatch, rows: range, shown: tuple[Shown, ...], eyes: VisionConfig) -> ImageBatch:
    """The batch with images in the places of tokens; no label on them."""
    tokens_BS, mask_BS = batch.tokens_BS.clone(), batch.loss_mask_BS.clone()
    images, tiles, first_tile = [], [torch.empty(0, 3, eyes.tile_size, eyes.tile_size, dtype=torch.uint8)], 0
    for b, row in enumerate(rows):
        for number, (place, width, height) in enumerate(shown[row % len(shown)]):
            layout = lay_image(width, height, tile_rules(eyes))
            end = place + layout.tokens
            assert end <= SEQ
            tokens_BS[b, place:end], mask_BS[b, place : end - 1] = eyes.image_token, False
            source: Any = SimpleNamespace(width=width, height=height)
            images.append(BatchImage(source, b * SEQ + place, layout.tokens, first_tile, layout))
            first_tile += layout.tiles
            draw = torch.Generator().manual_seed(97 * row + number)
            size = (layout.tiles, 3, eyes.tile_size, eyes.tile_size)
            tiles.append(torch.randint(0, 256, size, generator=draw, dtype=torch.uint8))
    given = {one.name: getattr(batch, one.name) for one in fields(PackedBatch)}
    given |= {"tokens_BS": tokens_BS, "loss_mask_BS": mask_BS}
    return ImageBatch(**given, tiles_TCHW=torch.cat(tiles), images=tuple(images))


def train_vision(job: VisionJob) -> Seen:
    """Run on every process of the world."""
    layout = plan_layout(mesh.world_size(), job.parallel, job.model, [SEQ])
    try:
        return _train(job, mesh.start(ClusterConfig(device="cpu"), layout))
    finally:
        mesh.stop()


def _train(job: VisionJob, context: mesh.ParallelContext) -> Seen:
    module = meta_model(job.model).to(job.dtype)
    freeze(module, job.frozen)
    model = apply_parallel(module, context, job.parallel, job.dtype)
    model.initialise(7)
    optimizer = build_optimizer(model.module, OptimConfig(weight_decay=0.3))
    gradients: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update(_gradients(model.module)))
    results, rows = [], job.parallel.micro_batch_rows
    for step in range(job.steps):
        starts = range(step * job.rows, (step + 1) * job.rows, rows)[context.dp_rank :: context.dp_size]
        batches = [show(micro_batch(one, rows), range(one, one + rows), job.shown, job.model.vision) for one in starts]
        results.append(train_step(model, optimizer, batches, job.lr, job.model.rope_base, clip_grad=None))
    after = {name: p.full_tensor().clone() for name, p in model.module.named_parameters()}
    return Seen(gradients, after, results)


def _gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients of parameters that are trained."""
    return {name: p.grad.full_tensor().clone() for name, p in module.named_parameters() if p.grad is not None}


def alone(job: VisionJob) -> VisionJob:
    """The same work for one process."""
    rows = job.parallel.micro_batch_rows
    return replace(job, parallel=ParallelConfig(micro_batch_rows=rows))

"""Steps of a model with a contrastive loss over rows of captions, on every process, and what is left of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mmdata.images.batch import BatchImage, ImageBatch
from mmdata.images.grid import lay_image
from mmdata.images.row import RowImage
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ContrastiveConfig, ModelConfig, OptimConfig, ParallelConfig, VisionConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from mmtrain.vision.images import tile_rules
from tests.dist.layouts import Outcome, whole

SEQ, IMAGE = 96, 100
EYES = VisionConfig(image_token=IMAGE, tile_size=16, patch_size=8, grids=[], hidden_size=16, num_layers=2, num_heads=2,
                    ffn_hidden_size=24, contrastive=ContrastiveConfig(size=12, temperature=0.2))  # fmt: skip
MODEL = ModelConfig("sees", vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                    ffn_hidden_size=32, layer_pattern="LS", rotary_dim=4, num_experts=0, loss_chunk_tokens=50,
                    vision=EYES)  # fmt: skip
CAPTIONS = ((4, 7, 3), (5,), (), (6, 2, 9, 1), (3, 8), (), (7, 7), (2,))
"""Tokens of the captions of each row: rows without an image, and of all numbers of them."""


@dataclass(frozen=True)
class PairsJob:
    """Steps of `rows` rows of captions.

    Attributes:
        first: number of the first row.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rows: int = 4
    steps: int = 1
    lr: float = 1e-3
    first: int = 0


def caption_rows(first: int, count: int) -> ImageBatch:
    """Rows as the loader gives them: documents of an image and its caption, one of text, and padding."""
    layout = lay_image(20, 20, tile_rules(EYES))
    tokens, masks, bounds, positions, images, tiles, real = [], [], [0], [], [], [], []
    for b, number in enumerate(range(first, first + count)):
        generator = torch.Generator().manual_seed(number)
        captions = CAPTIONS[number % len(CAPTIONS)]
        lengths = [*(layout.tokens + caption for caption in captions), 6]
        row, mask, at = torch.randint(0, IMAGE, (SEQ,), generator=generator), torch.zeros(SEQ, dtype=torch.bool), 0
        for i, length in enumerate(lengths):
            if i < len(captions):
                row[at : at + layout.tokens] = IMAGE
                source = RowImage(f"{number}", 0, 1, 20, 20, at, layout.tokens)
                images.append(BatchImage(source, b * SEQ + at, layout.tokens, len(tiles), layout))
                tiles.append(torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8))
                mask[at + layout.tokens - 1 : at + length - 1] = True
            else:
                mask[at : at + length - 1] = True
            at += length
            bounds.append(b * SEQ + at)
        bounds.append((b + 1) * SEQ)
        real.append(at)
        positions.append(torch.cat([*map(torch.arange, lengths), torch.arange(SEQ - at)]))
        tokens.append(row)
        masks.append(mask)
    tokens_BS = torch.stack(tokens)
    return ImageBatch(
        tokens_BS, tokens_BS.roll(-1, 1), torch.stack(masks), torch.stack(positions),
        torch.tensor(bounds, dtype=torch.int32), tuple(range(first, first + count)), real_tokens=tuple(real),
        tiles_TCHW=torch.stack(tiles) if tiles else torch.empty(0, 3, 0, 0, dtype=torch.uint8), images=tuple(images),
    )  # fmt: skip


def train_pairs(job: PairsJob) -> Outcome:
    """Run on every process of the world."""
    layout = plan_layout(mesh.world_size(), job.parallel, MODEL, [SEQ])
    try:
        return _train(job, mesh.start(ClusterConfig(device="cpu"), layout))
    finally:
        mesh.stop()


def _train(job: PairsJob, context: mesh.ParallelContext) -> Outcome:
    model = apply_parallel(meta_model(MODEL), context, job.parallel, torch.float32)
    model.initialise(7)
    before, gradients, results = whole(model.module), {}, []
    optimizer = build_optimizer(model.module, OptimConfig())
    optimizer.register_step_pre_hook(
        lambda *_: None if results else gradients.update(whole(model.module, gradient=True))
    )
    rows = job.parallel.micro_batch_rows
    for step in range(job.steps):
        begin = job.first + step * job.rows
        starts = range(begin, begin + job.rows, rows)[context.dp_rank :: context.dp_size]
        batches = [caption_rows(start, rows) for start in starts]
        results.append(train_step(model, optimizer, batches, job.lr, 1e4, clip_grad=None))
    return Outcome(before, gradients, whole(model.module), results)

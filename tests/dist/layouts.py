"""A training step of a small model under any layout, and the same in one process: what the layout tests compare."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from mmdata.rows.loader import PackedBatch
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step

SEQ = 48
MODEL = ModelConfig("small", vocab_size=101, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8,
                    ffn_hidden_size=32, layer_pattern="LLLS", rotary_dim=4, num_experts=8, capacity_factor=0.8,
                    loss_chunk_tokens=50)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What every layout is given: steps of `rows` packed rows, of which a micro-batch has `parallel.micro_batch_rows`.

    Attributes:
        lr: 0 leaves the weights alone, so that later steps can be compared as closely as the first.
        probe: the step whose gradients are kept.
        real: tokens of each row before its padding, over and over; empty for rows that are never padded.
    """

    model: ModelConfig = field(default_factory=lambda: MODEL)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rows: int = 8
    steps: int = 1
    lr: float = 1e-3
    probe: int = 0
    real: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What one rank saw; the tensors are whole parameters, those that it has a part of."""

    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    results: list[StepResult]


def packed_row(row: int, vocab_size: int = 101) -> PackedBatch:
    """A row of documents of random lengths, some of one token, with labels that differ in number from row to row."""
    rng = np.random.default_rng(row)
    tokens = rng.integers(0, vocab_size, SEQ + 1)
    cuts = sorted({0, SEQ, *rng.integers(1, SEQ, 5).tolist(), 7, 8})
    position = np.concatenate([np.arange(b - a) for a, b in itertools.pairwise(cuts)])
    mask = np.ones(SEQ, dtype=bool)
    mask[np.array(cuts[1:]) - 1] = False
    mask[: row % 8 * 5] = False
    as_row = [torch.from_numpy(a)[None] for a in (tokens[:-1], tokens[1:], mask, position)]
    return PackedBatch(*as_row, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), rows=(row,))


def padded_row(row: int, real: int) -> PackedBatch:
    """`packed_row` with padding after its first `real` tokens."""
    whole = packed_row(row)
    cuts = sorted({0, *(cut for cut in whole.cu_seqlens.tolist() if cut < real), real, SEQ})
    place, padding = torch.arange(SEQ), torch.arange(SEQ) >= real
    return PackedBatch(
        whole.tokens_BS.masked_fill(padding, 0),
        whole.labels_BS.masked_fill(padding, 0),
        whole.loss_mask_BS & ~padding,
        torch.where(padding, place - real, whole.position_ids_BS),
        torch.tensor(cuts, dtype=torch.int32),
        (row,),
        real_tokens=(real,),
    )


def micro_batch(first: int, count: int, real: tuple[int, ...] = ()) -> PackedBatch:
    """The packed rows [first, first + count) as one batch, padded as :class:`Job` says."""
    numbers = range(first, first + count)
    rows = [padded_row(row, real[row % len(real)]) if real else packed_row(row) for row in numbers]
    stacked = {name: torch.cat([getattr(row, name) for row in rows])
               for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")}  # fmt: skip
    bounds = [rows[0].cu_seqlens, *(row.cu_seqlens[1:] + i * SEQ for i, row in enumerate(rows[1:], 1))]
    tokens = tuple(row.real_tokens[0] for row in rows) if real else None
    return PackedBatch(**stacked, cu_seqlens=torch.cat(bounds), rows=tuple(numbers), real_tokens=tokens)


def train(job: Job) -> Outcome:
    """Run on every process of the world."""
    layout = plan_layout(mesh.world_size(), job.parallel, job.model, [SEQ])
    try:
        return _train(job, mesh.start(ClusterConfig(device="cpu"), layout))
    finally:
        mesh.stop()


def _train(job: Job, context: mesh.ParallelContext) -> Outcome:
    model = apply_parallel(meta_model(job.model), context, job.parallel, torch.float32)
    model.initialise(7)
    before = whole(model.module)
    optimizer = build_optimizer(model.module, OptimConfig())
    gradients: dict[str, torch.Tensor] = {}
    results: list[StepResult] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(whole(model.module, gradient=True)) if len(results) == job.probe else None
    )
    for step in range(job.steps):
        rows = job.parallel.micro_batch_rows
        starts = range(step * job.rows, (step + 1) * job.rows, rows)[context.dp_rank :: context.dp_size]
        batches = [micro_batch(start, rows, job.real) for start in starts]
        results.append(train_step(model, optimizer, batches, job.lr, job.model.rope_base, clip_grad=None))
    return Outcome(before, gradients, whole(model.module), results)


def whole(model: nn.Module, gradient: bool = False) -> dict[str, torch.Tensor]:
    """Full parameters, or their full gradients."""
    return {name: (p.grad if gradient else p).full_tensor().clone() for name, p in model.named_parameters()}


def alone(job: Job) -> Job:
    """The same work for one process."""
    rows, over = job.parallel.micro_batch_rows, job.parallel.aux_loss_over
    return replace(job, parallel=ParallelConfig(micro_batch_rows=rows, aux_loss_over=over))

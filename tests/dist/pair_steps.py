"""Steps on packed rows with preference pairs, on every process of a layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from mmdata.images.batch import ImageBatch
from mmdata.rows.loader import PackedBatch
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.evaluate import PairValidation, evaluate_pairs
from mmtrain.train.pairs import LogProbs, References
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import train_step
from tests.dist.layouts import SEQ, whole

BETA = 0.3
BOUNDS = (0, 12, 22, 27, 37, SEQ)  # a pair, a document of none, a pair that is the last
PAIRS = ((0, 12, 22), (27, 37, SEQ))
PROMPT = 4  # tokens of an answer's document before what is learned


@dataclass(frozen=True)
class PairJob:
    """Steps of `rows` packed rows.

    Attributes:
        bare: rows without a pair.
    """

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rows: int = 4
    steps: int = 2
    lr: float = 1e-3
    bare: tuple[int, ...] = (1, 3)


@dataclass
class PairOutcome:
    """What one rank saw; the tensors are whole parameters, those that it has a part of."""

    gradients: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    results: list[StepResult]
    valid: PairValidation


def pair_row(row: int, bare: bool = False) -> ImageBatch:
    """A row of five documents, of which four are two pairs, unless it has none."""
    rng = np.random.default_rng(row)
    tokens = torch.from_numpy(rng.integers(0, 101, SEQ + 1))[None]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    mask, position = torch.ones(1, SEQ, dtype=torch.bool), torch.zeros(1, SEQ, dtype=torch.int64)
    for begin, end in itertools.pairwise(BOUNDS):
        mask[0, begin : begin + PROMPT] = False
        mask[0, end - 1] = False
        position[0, begin:end] = torch.arange(end - begin)
    names = tuple(f"row/{2 * row + i}" for i in range(2))
    pairs = {} if bare else {"pairs": PAIRS, "pair_ids": names}
    return ImageBatch(tokens[:, :-1], tokens[:, 1:], mask, position, bounds, (row,), **pairs)


def pair_batch(first: int, count: int, bare: tuple[int, ...] = ()) -> ImageBatch:
    """Rows first to first + count as one batch."""
    rows = [pair_row(row, row in bare) for row in range(first, first + count)]
    names = [one.name for one in fields(PackedBatch) if one.name.endswith("_BS")]
    stacked = {name: torch.cat([getattr(row, name) for row in rows]) for name in names}
    bounds = [rows[0].cu_seqlens, *(row.cu_seqlens[1:] + i * SEQ for i, row in enumerate(rows[1:], 1))]
    pairs = [tuple(place + i * SEQ for place in pair) for i, row in enumerate(rows) for pair in row.pairs]
    ids = [name for row in rows for name in row.pair_ids]
    return ImageBatch(**stacked, cu_seqlens=torch.cat(bounds), rows=tuple(range(first, first + count)),
                      pairs=tuple(pairs), pair_ids=tuple(ids))  # fmt: skip


def references(pairs: int = 64) -> References:
    """Log-probabilities that a model of random weights may have."""
    rng = np.random.default_rng(5)
    known: dict[str, LogProbs | None] = {}
    for i in range(pairs):
        chosen, rejected = (rng.normal(size=2) - 30).tolist()
        known[f"row/{i}"] = chosen, rejected
    return References(BETA, known)


def train_pairs(job: PairJob) -> PairOutcome:
    """Run on every process of the world."""
    layout = plan_layout(mesh.world_size(), job.parallel, job.model, [SEQ])
    try:
        return _train(job, mesh.start(ClusterConfig(device="cpu"), layout))
    finally:
        mesh.stop()


def _train(job: PairJob, context: mesh.ParallelContext) -> PairOutcome:
    model = apply_parallel(meta_model(job.model), context, job.parallel, torch.float32)
    model.initialise(7)
    optimizer, known = build_optimizer(model.module, OptimConfig()), references()
    gradients: dict[str, torch.Tensor] = {}
    results: list[StepResult] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(whole(model.module, gradient=True)) if not results else None
    )
    for step in range(job.steps):
        rows = job.parallel.micro_batch_rows
        starts = range(step * job.rows, (step + 1) * job.rows, rows)[context.dp_rank :: context.dp_size]
        batches: list[PackedBatch] = [pair_batch(start, rows, job.bare) for start in starts]
        made = train_step(model, optimizer, batches, job.lr, job.model.rope_base, clip_grad=None, references=known)
        results.append(made)
    after = whole(model.module)  # before a validation, which leaves parameters gathered
    held_out = range(10 + context.dp_rank, 10 + -(-3 // context.dp_size) * context.dp_size, context.dp_size)
    valid = evaluate_pairs(model, [(pair_row(min(row, 12)), row < 13) for row in held_out], job.model.rope_base, known)
    return PairOutcome(gradients, after, results, valid)

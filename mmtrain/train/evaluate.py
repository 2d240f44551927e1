"""Held-out loss, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mmdata.rows.loader import PackedBatch
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline.schedule import pipeline_of
from mmtrain.train.step import model_inputs


@dataclass(frozen=True)
class Validation:
    """Held-out figures over all ranks: nats a labelled token, and bits a UTF-8 byte of the text they stand for."""

    loss: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[PackedBatch, bool]], token_bytes: np.ndarray, context: ParallelContext
) -> Validation:
    """Validate on this rank's batches, dropless.

    Args:
        batches: every rank gives equally many (sharded parameters are gathered together); those paired with False only
            keep step with the other ranks and are not counted.
        token_bytes: bytes of text that each token stands for, [V].
    """
    model.eval()
    pipeline = pipeline_of(model)
    totals = torch.zeros(3, dtype=torch.float64)
    for batch, counts in batches:
        inputs = model_inputs(batch, context.device)
        ce_sum = model(*inputs).ce_sum if pipeline is None else pipeline.forward(inputs)
        if counts and ce_sum is not None:
            labels = batch.labels_BS[batch.loss_mask_BS].numpy()
            totals += torch.tensor([ce_sum.item(), labels.size, float(token_bytes[labels].sum())], dtype=torch.float64)
    model.train()
    totals = totals.to(context.device)
    dist.all_reduce(totals, group=context.replicas.get_group())
    if pipeline is not None:
        dist.all_reduce(totals, group=context.dense["pp"].get_group())
    nats, tokens, size = totals.tolist()
    return Validation(nats / max(tokens, 1.0), nats / math.log(2) / max(size, 1.0))

"""Held-out loss, in nats a token and in bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.train.step import model_inputs


@dataclass(frozen=True)
class Validation:
    """Held-out figures over all ranks: nats a labelled token, and bits a UTF-8 byte of the text they stand for."""

    loss: float
    bits_per_byte: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


def evaluate(
    model: ParallelModel, batches: Iterable[tuple[PackedBatch, bool]], token_bytes: np.ndarray, rope_base: float
) -> Validation:
    """Validate on this rank's batches, dropless.

    Args:
        batches: every rank gives equally many (sharded parameters are gathered together); those paired with False only
            keep step with the other ranks and are not counted.
        token_bytes: bytes of text that each token stands for, [V].
        rope_base: RoPE base of the phase.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    with model.evaluating():
        for batch, counts in batches:
            ce_sum = model.evaluate(model_inputs(batch, rope_base, model.context.device, model.module.config.vision))
            if counts and ce_sum is not None:
                labels = batch.labels_BS[batch.loss_mask_BS].numpy()
                counted = model.context.cp_rank == 0  # ranks that share a row have its labels all
                figures = [ce_sum.item(), counted * labels.size, counted * float(token_bytes[labels].sum())]
                totals += torch.tensor(figures, dtype=torch.float64)
    nats, tokens, size = model.sum_over_ranks(totals.to(model.context.device)).tolist()
    return Validation(nats / max(tokens, 1.0), nats / math.log(2) / max(size, 1.0))

"""Held-out loss, in nats a token and in bits a byte, or of preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.model.preference import FIGURES, preference_loss
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.train.pairs import PairFigures, References
from mmtrain.train.step import model_inputs


class HeldOut(Protocol):
    """What a validation found, of tokens or of pairs."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats."""

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""

    def record(self) -> dict[str, float]:
        """Figures by name, for metrics."""

    def line(self) -> str:
        """Figures in words."""


@dataclass(frozen=True)
class Validation:
    """Held-out figures over all ranks: nats a labelled token, and bits a UTF-8 byte of the text they stand for."""

    loss: float
    bits_per_byte: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    def record(self) -> dict[str, float]:
        """Figures by name, for metrics."""
        return {"val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}

    def line(self) -> str:
        """Figures in words."""
        return f"held-out loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte"


@dataclass(frozen=True)
class PairValidation:
    """Held-out figures of preference pairs over all ranks: mean loss a pair in nats, and their rewards."""

    loss: float
    figures: PairFigures

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    def record(self) -> dict[str, float]:
        """Figures by name, for metrics."""
        return {"val_loss": self.loss, **self.figures.record("val_")}

    def line(self) -> str:
        """Figures in words."""
        found = self.figures
        return (f"held-out loss {self.loss:.4f} a pair, {found.pair_accuracy:.1%} of {found.pairs} right, margin "
                f"{found.pair_margin:.4f}")  # fmt: skip


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


def evaluate_pairs(
    model: ParallelModel, batches: Iterable[tuple[PackedBatch, bool]], rope_base: float, references: References
) -> PairValidation:
    """Validate on the preference pairs of this rank's batches, dropless.

    Args:
        batches: as :func:`evaluate` takes them.
        rope_base: RoPE base of the phase.
        references: of the pairs.
    """
    totals = torch.zeros(1 + len(FIGURES), dtype=torch.float64)
    context, vision = model.context, model.module.config.vision
    with model.evaluating():
        for batch, counts in batches:
            inputs = model_inputs(batch, rope_base, context.device, vision, references)
            score = model.score_pairs(inputs)
            if counts and score is not None and context.cp_rank == 0:
                assert inputs.pairs is not None
                found = preference_loss(score, inputs.pairs)
                totals += torch.cat([found.loss[None], found.figures]).cpu()
    loss, *figures = model.sum_over_ranks(totals.to(context.device)).tolist()
    return PairValidation(loss / max(figures[0], 1.0), PairFigures.of(figures))

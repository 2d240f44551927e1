"""Figures of one place of a grid of needles, in training and offline, and their record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.evals.sample import Cell


@dataclass(frozen=True)
class CellScore:
    """Figures of one place of the grid, over all its samples.

    Attributes:
        cell: the place.
        passed: percentage of samples whose answer tokens are all right.
        tokens: percentage of answer tokens that are right.
        nats: mean cross-entropy of an answer token, which moves long before answers are right.
    """

    cell: Cell
    passed: float
    tokens: float
    nats: float

    @staticmethod
    def of_samples(cell: Cell, labelled: Sequence[float], correct: Sequence[float], nats: Sequence[float]) -> CellScore:
        """Return the figures of samples.

        Args:
            cell: the place.
            labelled: of each sample, its answer tokens.
            correct: those that are the argmax of the logits after all tokens before.
            nats: sum of their cross-entropies.
        """
        passed = [right == all_of for right, all_of in zip(correct, labelled, strict=True)]
        return CellScore(cell, 100 * sum(passed) / len(passed), 100 * sum(correct) / sum(labelled),
                         sum(nats) / sum(labelled))  # fmt: skip

    def record(self, samples: int, repeats: float) -> dict[str, Any]:
        """Return the figures as one of a record's `needle_cells`.

        Args:
            samples: of the place.
            repeats: how often a sample reads the held-out text; 1 where it does not repeat.
        """
        return {**self.cell._asdict(), "samples": samples, "passed": round(self.passed, 3),
                "tokens": round(self.tokens, 3), "nats": self.nats, "repeats": round(repeats, 3)}  # fmt: skip

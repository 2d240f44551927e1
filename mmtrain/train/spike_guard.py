"""Guard against spikes: the loss and the gradient norm that a step may have, by those of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmtrain.config import GuardConfig
from mmtrain.train.statistics import StepResult


class Limits(NamedTuple):
    """What a step may have at most; one that has more is skipped.

    Attributes:
        loss: mean cross-entropy over labelled tokens, in nats.
        grad_norm: global norm before clipping.
    """

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()


class SpikeGuard:
    """Windows of the losses and norms of the steps that were taken, and the steps in a row that were not.

    All of it follows from what the steps gave, which all ranks have alike, so ranks agree without a word. It is part of
    a checkpoint, so that a run which is resumed skips what the same run would have skipped.

    Attributes:
        in_row: steps that were skipped since the last that was taken.
        first_skipped: number of the first of them.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config, self._phase = config, -1
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self.in_row = self.first_skipped = 0

    @property
    def is_on(self) -> bool:
        """Whether steps are skipped for their size."""
        return self._config.spike_deviations is not None

    @property
    def wants_rollback(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves are suspect."""
        return self.is_on and self.in_row >= self._config.max_in_row

    def limits(self, phase: int) -> Limits:
        """Return the limits of the next step; a phase's first steps have none, as its losses are not those before.

        Args:
            phase: index of the step's phase.
        """
        if not self.is_on:
            return NO_LIMITS
        if phase != self._phase:
            self._phase = phase
            self._losses.clear()
            self._norms.clear()
        return Limits(self._limit(self._losses), self._limit(self._norms))

    def take(self, step: int, result: StepResult) -> None:
        """Take in what a step gave.

        Args:
            step: its number.
            result: of the step.
        """
        if result.skipped:
            self.first_skipped = self.first_skipped if self.in_row else step
            self.in_row += 1
            return
        self.in_row = 0
        if self.is_on:
            self._losses.append(result.loss)
            self._norms.append(result.grad_norm)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON holds it without loss."""
        return {"phase": self._phase, "losses": list(self._losses), "grad_norms": list(self._norms),
                "in_row": self.in_row, "first_skipped": self.first_skipped}  # fmt: skip

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take over what a checkpoint kept; None is one of before the guard, or written without it."""
        made = SpikeGuard(self._config)
        if state is not None:
            made._phase, made.in_row, made.first_skipped = state["phase"], state["in_row"], state["first_skipped"]
            made._losses.extend(state["losses"])
            made._norms.extend(state["grad_norms"])
        self.__dict__.update(made.__dict__)

    def _limit(self, values: deque[float]) -> float:
        if self._config.spike_deviations is None or 2 * len(values) < self._config.spike_window:
            return math.inf
        taken = np.array(values)
        return float(taken.mean() + self._config.spike_deviations * taken.std())

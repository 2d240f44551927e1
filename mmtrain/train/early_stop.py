"""Early stop: a run that ends once its held-out loss has stopped falling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStop:
    """What a run's validations have come to. It is part of a checkpoint: a resumed run ends where it would have.

    Args:
        patience: validations in a row without a lower loss after which the run ends; None: never.

    Attributes:
        best: lowest held-out loss so far; infinite before the first.
        best_step: the step that it was measured after.
        since: validations since then.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best, self.best_step, self.since = math.inf, 0, 0

    @property
    def reached(self) -> bool:
        """Whether the run ends."""
        return self.patience is not None and self.since >= self.patience

    def is_best(self, step: int) -> bool:
        """Whether the run may end for want of a lower loss than the one measured after this step."""
        return self.patience is not None and self.best_step == step > 0

    def take(self, step: int, loss: float) -> None:
        """Take in the held-out loss after a step; one that is not finite is no improvement."""
        if loss < self.best:
            self.best, self.best_step, self.since = loss, step, 0
        else:
            self.since += 1

    def line(self) -> str:
        """Say why the run ends."""
        return (f"the held-out loss has not fallen for {self.since} validations (stage.preference.patience): the run "
                f"ends; it was lowest after step {self.best_step:,}, {self.best:.4f}")  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON holds it without loss."""
        return {"best": None if math.isinf(self.best) else self.best, "best_step": self.best_step, "since": self.since}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take over what a checkpoint kept; None is one of a run without it."""
        made = EarlyStop(self.patience)
        if state is not None:
            made.best = math.inf if state["best"] is None else state["best"]
            made.best_step, made.since = state["best_step"], state["since"]
        self.__dict__.update(made.__dict__)

"""Time of evaluations, kept within a share of a phase's: set further apart first, then made smaller, then left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from mmtrain.evals.grid import Grid


class Plan(NamedTuple):
    """Evaluations in the rest of a phase.

    Attributes:
        grid: of each; None: there are none.
        every: steps from one to the next; 0: at the end of the phase only.
    """

    grid: Grid | None
    every: int


@dataclass
class Costs:
    """Measured seconds of evaluations.

    Attributes:
        ranks: that take samples in turn.
        fixed: seconds of an evaluation beside its samples.
        round_s: seconds of a round, in which each rank runs a sample, of each length.
    """

    ranks: int
    fixed: float = 0.0
    round_s: dict[int, float] = field(default_factory=dict)

    def measured(self, grid: Grid, by_length: dict[int, float], total: float) -> None:
        """Take in what an evaluation took: seconds of each length, and in all."""
        self.fixed = max(0.0, total - sum(by_length.values()))
        self.round_s |= {length: seconds / self._rounds(grid) for length, seconds in by_length.items()}

    def of(self, grid: Grid) -> float:
        """Return the seconds of an evaluation, all of whose lengths have been measured."""
        return self.fixed + self._rounds(grid) * sum(self.round_s[length] for length in grid.lengths)

    def _rounds(self, grid: Grid) -> int:
        return -(-grid.samples_of_length // self.ranks)


def allowance(share: float, step_seconds: float, steps: int, spent: float) -> float:
    """Return the seconds that evaluations may still take in a phase, so that they are at most `share` of its time.

    Args:
        share: of steps and evaluations together, below 1.
        step_seconds: of a step.
        steps: all of the phase, those that are done too.
        spent: seconds of evaluations in the phase so far.
    """
    return share / (1.0 - share) * step_seconds * steps - spent


def fit(grid: Grid, cost: Callable[[Grid], float], seconds: float, steps: int, every: int) -> Plan:
    """Fit the evaluations of the rest of a phase, one at its end among them, into some seconds.

    Args:
        grid: that is wanted.
        cost: seconds of a grid.
        seconds: that they may take in all.
        steps: from the last evaluation, or the beginning, to the phase's end.
        every: steps from one to the next that are wanted; 0: at the end only.
    """
    wanted = max(1, -(-steps // every)) if every else 1
    affordable = int(max(0.0, seconds) / max(cost(grid), 1e-9))
    if affordable >= wanted:
        return Plan(grid, every)
    if affordable:
        return Plan(grid, -(-steps // affordable))
    return Plan(next((thin for thin in grid.thinner() if cost(thin) <= seconds), None), 0)

"""Options of the guard: which steps a run leaves out, and when it goes back to an earlier checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed


@dataclass
class GuardConfig:
    """Guard against spikes of loss and gradient. All numbers are chosen here: the paper does not state any.

    A step that the guard skips leaves weights and moments alone, as one that is not finite does, and its rows are on
    record in the run's `ledger.jsonl`.

    Attributes:
        spike_deviations: a step is skipped whose loss or gradient norm lies more than so many standard deviations above
            the mean of the steps before it; null turns the guard off.
        spike_window: steps of the same phase, taken ones alone, that mean and deviation are of; nothing is skipped
            before half as many were taken.
        max_in_row: steps in a row that were skipped, for whatever reason, after which the run goes back to an earlier
            checkpoint, and leaves out all data since then.
        rollback_steps: so many steps before the first of them, or more, that checkpoint must be.
        max_rollbacks: how often a run goes back within a phase; once more ends it.
        copies_interval: steps between comparisons of the parameters that several ranks have copies of (under tensor
            parallelism, norms and routers), bit for bit: a rank that differs has a faulty device, and the run ends
            before it is saved. 0 compares before each checkpoint alone.
        pace_interval: steps between comparisons of the ranks' pace: of a product of each device, and of the time that
            each waits for rows. A rank that is slower than the others twice in a row is named. 0 compares never.
    """

    spike_deviations: float | None = field(default=None, metadata=above(0, fix="null turns the guard off"))
    spike_window: int = field(default=128, metadata=at_least(4))
    max_in_row: int = field(default=5, metadata=at_least(1))
    rollback_steps: int = field(default=100, metadata=at_least(0))
    max_rollbacks: int = field(default=3, metadata=at_least(0, fix="0 ends a run instead of going back"))
    copies_interval: int = field(default=100, metadata=at_least(0, fix="0 compares before each checkpoint alone"))
    pace_interval: int = field(default=100, metadata=at_least(0, fix="0 compares never"))

    def validate(self) -> None:
        """Refuse numbers out of range."""
        check_allowed(self, "guard")

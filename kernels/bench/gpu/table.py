"""A row of the table: times, what follows from them, and the goal they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

Call = Callable[[], Any]
Cell = float | str | None
"""Milliseconds, the name of the error that came instead, or None for what was not tried."""


class Label(NamedTuple):
    """Which row: group, what runs, on what shape."""

    group: str
    name: str
    shape: str


class Peer(NamedTuple):
    """What a row is compared with; without a call it is not installed."""

    name: str
    call: Call | None


@dataclass
class Row:
    """One line of the table. ``of_floor`` is floor over ours, ``ratio_to_peer`` the peer's time over ours."""

    group: str
    name: str
    shape: str
    ours_ms: Cell = None
    peer: str | None = None
    peer_ms: Cell = None
    floor_ms: float | None = None
    of_floor: float | None = None
    ratio_to_peer: float | None = None
    goal: str | None = None
    reached: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """A number of the row or of its extra; None where there is none."""
        value = getattr(self, name) if hasattr(self, name) else self.extra.get(name)
        return float(value) if isinstance(value, int | float) else None

    def finish(self, goal: Goal | None) -> None:
        """Fill in what follows from the times, and whether the goal is reached."""
        self.of_floor = ratio(self.floor_ms, self.ours_ms)
        self.ratio_to_peer = ratio(self.peer_ms, self.ours_ms)
        if goal is not None:
            self.goal, self.reached = goal.text, goal.reached(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, numbers at six digits."""
        return tidy(asdict(self))


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of the row, from below (``least``) or from above."""

    figure: str
    bound: float
    text: str
    least: bool = True

    def reached(self, row: Row) -> bool | None:
        """False where ours raised; None where the figure could not be measured."""
        if isinstance(row.ours_ms, str):
            return False
        value = row.figure(self.figure)
        if value is None:
            return None
        return value >= self.bound if self.least else value <= self.bound


def floor_goal(bound: float | None) -> Goal | None:
    """At least this fraction of the floor; None passes through."""
    return None if bound is None else Goal("of_floor", bound, f"{bound:.2f} of the floor")


def ratio_goal(bound: float) -> Goal:
    """At least this many times as fast as the peer."""
    return Goal("ratio_to_peer", bound, "not slower than the peer" if bound == 1.0 else f"{bound:g} x the peer's speed")


def ratio(above: Cell, below: Cell) -> float | None:
    """A quotient of two times; None unless both are there."""
    if not isinstance(above, int | float) or not isinstance(below, int | float) or not below:
        return None
    return above / below


def tidy(value: Any) -> Any:
    """The same, floats at six significant digits, those that JSON cannot hold as None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): tidy(item) for key, item in value.items()}
    return [tidy(item) for item in value] if isinstance(value, list | tuple) else value

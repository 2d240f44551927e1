"""Progress of an evaluation: a line for each task and length that is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mmtrain.evals.offline.units import Unit


class Progress:
    """Counts samples, and tells of each task and length when its last one is done.

    Args:
        units: all of the evaluation.
        say: takes a line.
    """

    def __init__(self, units: Sequence[Unit], say: Callable[[str], None]) -> None:
        self._say, self._total = say, len(units)
        self._left = Counter((unit.task, unit.length) for unit in units)
        self._found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        self._done = 0

    def done(self, record: dict[str, Any]) -> None:
        """Take in the record of a sample."""
        place = record["task"], record["length"]
        own = self._found.setdefault(place, [])
        own.append(record)
        self._done, self._left[place] = self._done + 1, self._left[place] - 1
        if self._left[place]:
            return
        kept = [one for one in own if not one.get("left_out")]
        named = "loss" if all("loss" in one for one in kept) else "score"
        mean = sum(one[named] for one in kept) / len(kept) if kept else float("nan")
        at = "" if record["length"] is None else f" at {record['length']:,} tokens"
        seconds = sum(one.get("seconds", 0.0) for one in kept)
        samples = f"{len(kept)} sample{'s' * (len(kept) != 1)}"
        self._say(
            f"[{self._done}/{self._total}] {record['task']}{at}: {named} {mean:.4g} of {samples}, {seconds:.1f} s"
        )

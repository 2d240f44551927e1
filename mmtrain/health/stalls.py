"""A step that does not end though every rank beats: who stands where, in one line, and all stacks in files."""

from __future__ import annotations

import sys
from pathlib import Path

from mmtrain.errors import RankLost
from mmtrain.health.heartbeat import RUNNING, Heartbeat
from mmtrain.health.stacks import dump, main_place

TOLD_AFTER_BEATS = 3  # by then every rank of the same step has said where it stands
NAMED = 8  # ranks that a line names


class Stall:
    """Watch over the step at work of this rank and, on rank 0, over what the others say of theirs.

    A rank that hangs in Python, or in a collective that others have left, beats on. What tells it from those that wait
    for it is where its main thread stands.

    Args:
        heartbeat: of this rank.
        patience: seconds that a step may take before it counts as stalled. It may only be slow: nothing is ended.
        folder: where stacks go; None: nowhere.
    """

    def __init__(self, heartbeat: Heartbeat, patience: float, folder: Path | None) -> None:
        self._heartbeat, self._patience, self._folder = heartbeat, patience, folder
        self._step: int | None = None
        self._since = 0.0
        self._told = False

    def look(self) -> None:
        """Notice that this rank's step has stalled or moved on; one thread calls it, a few times an interval."""
        heartbeat = self._heartbeat
        if heartbeat.step != self._step:
            self._step, self._since, self._told = heartbeat.step, heartbeat.now, False
            if heartbeat.stalled_at:
                heartbeat.say_stalled("")
        if self._step is None or heartbeat.own.state != RUNNING:
            return
        waited = heartbeat.now - self._since
        if waited > self._patience and not heartbeat.stalled_at:
            heartbeat.say_stalled(main_place())
            self.dump()
        late = waited > self._patience + TOLD_AFTER_BEATS * heartbeat.interval
        if heartbeat.rank == 0 and late and not self._told:
            self._told = True
            print(f"warning: no step for {waited:.0f} s (step {self._step}): {self._places()}{self._files()}",
                  file=sys.stderr, flush=True)  # fmt: skip

    def dump(self) -> None:
        """Write this rank's stacks; not before the first step, when the folder may be another launch's."""
        if self._folder is not None and self._heartbeat.step is not None:
            dump(self._folder / f"rank-{self._heartbeat.rank:05d}.txt")

    def verdict(self) -> RankLost | None:
        """Return who stood where, after an error in a step that had stalled.

        None if it had not, or if all stood at the same place: nobody is to blame then, and the error says more.
        """
        if not self._heartbeat.stalled_at or len(self._by_place()) == 1:
            return None
        return RankLost(f"step {self._step} did not end: {self._places()}{self._files()}; see the logs of the ranks "
                        "that stand apart for the cause, then go on with run.resume=auto")  # fmt: skip

    def _places(self) -> str:
        """Describe where ranks stand; those that stand apart from most first."""
        parts = sorted(self._by_place().items(), key=lambda item: (len(item[1]), item[1]))
        return "; ".join(f"{_ranks(ranks, self._heartbeat)} at {place}" for place, ranks in parts)

    def _by_place(self) -> dict[str, list[int]]:
        heartbeat, places = self._heartbeat, {}
        for rank in range(heartbeat.world):
            place = heartbeat.stalled_at if rank == heartbeat.rank else heartbeat.heard[rank].stalled_at
            places.setdefault(place or "another step", []).append(rank)
        return places

    def _files(self) -> str:
        return "" if self._folder is None else f"; stacks of all ranks: {self._folder}"


def _ranks(ranks: list[int], heartbeat: Heartbeat) -> str:
    if len(ranks) == 1:
        host, pid = heartbeat.hosts[ranks[0]]
        return f"rank {ranks[0]} of {heartbeat.world} (pid {pid} on {host})"
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:NAMED]))}{more}"

"""Figures of what an engine has done. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Occupancy(NamedTuple):
    """Requests of an engine and the memory they hold, at one moment.

    Attributes:
        waiting: requests that wait or are paused.
        running: requests at work.
        pages: pages that were planned.
        pages_used: those that requests or kept prefixes hold.
        slots: requests that may be at work at once.
        slots_used: slots of requests at work.
        prefixes: states that the prefix cache keeps.
    """

    waiting: int
    running: int
    pages: int
    pages_used: int
    slots: int
    slots_used: int
    prefixes: int


@dataclass
class EngineMetrics:
    """Counts since the engine was made.

    Attributes:
        steps: passes over the model.
        prefill_tokens: tokens that went through the prefill path.
        decode_tokens: tokens that went through the decode path.
        generated_tokens: tokens added to continuations.
        submitted: requests taken.
        refused: requests that could never be served.
        finished: requests served to their end.
        cancelled: requests taken back.
        image_tiles: tiles of images that the eyes looked at.
        preempted: times that a request gave its memory to an older one, to be read again later.
        prefix_lookups: prompts that the prefix cache was asked about.
        prefix_hits: those of which it knew a beginning.
        prefix_lookup_tokens: tokens of the prompts looked up.
        prefix_hit_tokens: those that did not have to be read.
        warned: whether :meth:`prefix_warning` has warned.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    generated_tokens: int = 0
    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    image_tiles: int = 0
    preempted: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    warned: bool = False

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompts' tokens that came from the prefix cache; 0 before the first."""
        return self.prefix_hit_tokens / max(self.prefix_lookup_tokens, 1)

    def prefix_warning(self, after: int) -> str | None:
        """Return a line to warn with, once, if the prefix cache knew none of so many prompts."""
        if self.warned or self.prefix_hits or self.prefix_lookups < after:
            return None
        self.warned = True
        return (
            f"the prefix cache knew the beginning of none of {self.prefix_lookups:,} prompts: prefix_slots=0 saves its "
            "memory, keep_prefix or a smaller prefix_interval lets it know more"
        )

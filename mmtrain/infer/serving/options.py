"""Options of the inference engine. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """Sizes that an engine is planned with.

    Attributes:
        max_running: requests at work at once; the others wait.
        prefill_tokens: tokens of prompts read in one step at most, so that a long prompt holds nobody up for longer.
        page_tokens: tokens of a page of keys and values.
        prefix_slots: states that the prefix cache keeps; 0 turns it off.
        prefix_interval: it keeps a prompt's state every so many tokens, or twice as many and so on, where that would
            take more than half of its slots; None where a request asks for it alone.
        memory_bytes: size of pages and slots; None takes `memory_share` of what is free on the device.
        memory_share: share of the free memory, beside what a step itself takes.
        longest: tokens of the longest request, its own and the new ones, if known: no pages are taken beyond those of
            `max_running` such requests and the prefix cache's.
        cuda_graphs: decode steps are CUDA graphs; None: on GPUs, where they can be. On a CPU `True` pads batches as
            graphs do and records nothing.
        warn_after: prompts without one hit of the prefix cache after which a warning says so, once.
    """

    max_running: int = 64
    prefill_tokens: int = 4096
    page_tokens: int = 64
    prefix_slots: int = 16
    prefix_interval: int | None = 2048
    memory_bytes: int | None = None
    memory_share: float = 0.8
    longest: int | None = None
    cuda_graphs: bool | None = None
    warn_after: int = 200

    def validate(self) -> None:
        """Refuse sizes that make no sense.

        Raises:
            ConfigError: the first that does not.
        """
        for name in ("max_running", "prefill_tokens", "page_tokens", "warn_after"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}", getattr(self, name), "must be at least 1", "leave it out")
        for name in ("prefix_interval", "memory_bytes", "longest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name}", value, "must be at least 1", "or None")
        if self.prefix_slots < 0:
            raise ConfigError("engine.prefix_slots", self.prefix_slots, "must be at least 0", "0 turns the cache off")
        if not 0 < self.memory_share <= 1:
            raise ConfigError("engine.memory_share", self.memory_share, "must lie in (0, 1]", "for example 0.8")

"""The plan of an engine's memory: how many pages and slots a number of bytes gives. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.registry import CacheSize, mixer_spec

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Pages and slots of an engine.

    Attributes:
        page_tokens: tokens of a page.
        pages: of each layer that keeps something of every token, on all ranks together; 0 where no layer does.
        running: slots of requests at work.
        kept: slots of the prefix cache.
        page_bytes: bytes of a page over all layers.
        slot_bytes: bytes of a slot over all layers.
        ranks: that share out the pages, as many each; every one has all slots.
    """

    page_tokens: int
    pages: int
    running: int
    kept: int
    page_bytes: int
    slot_bytes: int
    ranks: int = 1

    @property
    def paged(self) -> bool:
        """Whether any layer keeps something of every token."""
        return self.page_bytes > 0

    @property
    def bytes(self) -> int:
        """Bytes of the pages and slots of one rank."""
        return self.pages // self.ranks * self.page_bytes + (self.running + self.kept) * self.slot_bytes

    @property
    def longest(self) -> int | None:
        """Tokens of the longest request that can be served; None: any length."""
        return self.pages * self.page_tokens if self.paged else None

    def pages_of(self, tokens: int) -> int:
        """Pages that so many tokens of a document take."""
        return -(-tokens // self.page_tokens) if self.paged else 0


def token_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Return the bytes that all layers keep of each token, in the type of the keys."""
    return sum(size.token for size in _sizes(config)) * element_bytes


def document_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Return the bytes that all layers keep of each document: states in fp32, or float64 for a model of that."""
    return sum(size.document for size in _sizes(config)) * max(4, element_bytes)


def copies_bytes(config: ModelConfig, pages_bytes: int) -> int:
    """Return what a copy of keys takes beside all pages.

    Prefill lays out the keys of one layer as one tensor, no more than all pages hold: a layer's worth of pages. Decode
    steps read pages where they lie.
    """
    return pages_bytes // _paged_layers(config) if pages_bytes else 0


def without_copies(config: ModelConfig, budget: int) -> int:
    """Return what is left of a budget for pages and slots, beside :func:`copies_bytes`."""
    paged = _paged_layers(config)
    return max(0, budget * paged // (paged + 1) if paged else budget)


def _paged_layers(config: ModelConfig) -> int:
    return sum(size.token > 0 for size in _sizes(config))


def _sizes(config: ModelConfig) -> list[CacheSize]:
    return [mixer_spec(letter).cache_size(config) for letter in config.layer_types]


def plan_memory(
    config: ModelConfig, options: EngineOptions, element_bytes: int, budget: int, ranks: int = 1
) -> MemoryPlan:
    """Share a number of bytes out among slots and pages.

    Slots take half of it at most where there are pages too; of those that are too many, the prefix cache's go first.

    Args:
        config: of the model.
        options: see there.
        element_bytes: bytes of an element of the weights.
        budget: bytes to share out on each rank.
        ranks: that share out the pages.

    Raises:
        ConfigError: they are not enough for one request of one page.
    """
    page_bytes = token_bytes(config, element_bytes) * options.page_tokens
    slot_bytes = document_bytes(config, element_bytes)
    running, kept = options.max_running, options.prefix_slots
    if slot_bytes:
        slots = (budget // 2 if page_bytes else budget) // slot_bytes
        running = min(running, slots)
        kept = min(kept, slots - running)
    pages = (budget - (running + kept) * slot_bytes) // page_bytes if page_bytes else 0
    if running < 1 or (page_bytes and pages < 1):
        least = max(2 * slot_bytes, slot_bytes + page_bytes) if page_bytes else slot_bytes
        raise ConfigError("engine.memory_bytes", f"{budget / _MIB:.1f} MiB", f"one takes {least / _MIB:.1f} MiB",
                          "give more, or a device with more")  # fmt: skip
    if options.longest is not None and page_bytes:
        each = -(-options.longest // options.page_tokens) + 1
        pages = min(pages, -(-each * (options.max_running + options.prefix_slots) // ranks))
    return MemoryPlan(options.page_tokens, pages * ranks, running, kept, page_bytes, slot_bytes, ranks)

"""The memory of an engine: caches of all layers, and who owns which page and slot of them."""

from __future__ import annotations

from typing import Any

import torch

from mmtrain.config import ModelConfig
from mmtrain.infer.serving.memory_plan import MemoryPlan
from mmtrain.infer.serving.pages import PagePool
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch
from mmtrain.model.mixers.mixed_batch import MixedBatch
from mmtrain.model.mixers.registry import mixer_spec


class CacheMemory:
    """Pages and slots, on the device, with their books, on the host.

    Slots of running requests and of kept prefixes are apart, so that neither can use up the other's.

    Attributes:
        plan: the sizes.
        shape: those that every layer has, on this rank.
        pages: the pages' owners.
        running: free slots of requests at work.
        kept: free slots of the prefix cache.
        layers: one cache a layer, of its mixer's class.

    Raises:
        ConfigError: a layer's mixer decodes one document at a time alone.
    """

    def __init__(self, config: ModelConfig, plan: MemoryPlan, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = CacheShape(plan.pages // plan.ranks, plan.page_tokens, plan.running + plan.kept)
        classes = [mixer_spec(letter).batch_cache_class() for letter in config.layer_types]
        self.plan, self.device = plan, device
        self.pages = PagePool(plan.pages, plan.ranks)
        self.running = list(range(plan.running))
        self.kept = list(range(plan.running, plan.running + plan.kept))
        self.layers = [made(config, self.shape, dtype, device) for made in classes]

    def begin(self, slot: int) -> None:
        """Make a slot that of a document of which nothing has been read."""
        for layer in self.layers:
            layer.begin(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds, in all layers."""
        for layer in self.layers:
            layer.copy_slot(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Let a page hold what another one holds, in all layers."""
        for layer in self.layers:
            layer.copy_page(source, target)

    def view(self, batch: DocumentBatch | MixedBatch) -> list[Any]:
        """Return what the model takes to continue these documents."""
        return [layer.view(batch) for layer in self.layers]

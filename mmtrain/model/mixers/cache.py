"""Memory that decoding keeps of one document, over all layers; each mixer has a class of its own for its part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.registry import mixer_spec


@dataclass
class DecodeCache:
    """One cache a layer, of the class that the layer's mixer has, and the number of tokens seen."""

    layers: list[Any] = field(default_factory=list)
    length: int = 0

    @staticmethod
    def empty(config: ModelConfig) -> DecodeCache:
        """Make the cache of a document of which nothing has been read."""
        return DecodeCache([mixer_spec(letter).empty_cache() for letter in config.layer_types])

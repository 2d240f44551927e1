"""Memory that decoding keeps, over all layers; each mixer has a class of its own for its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.registry import mixer_spec


class ModelCache(Protocol):
    """What a model takes to continue documents.

    Attributes:
        layers: one entry a layer, what its mixer takes.
    """

    layers: Sequence[Any]

    def advance(self, tokens: int) -> None:
        """Note that so many tokens have gone through all layers."""


@dataclass
class DecodeCache:
    """Memory of one document: a cache of the class that each layer's mixer has, and the number of tokens seen.

    The engine makes one a pass, of views of its pages and slots. :meth:`empty` makes that of a document alone, of the
    mixers' plain caches, which the engine's are tested against; nothing else decodes with these.
    """

    layers: list[Any] = field(default_factory=list)
    length: int = 0

    @staticmethod
    def empty(config: ModelConfig) -> DecodeCache:
        """Make the cache of a document of which nothing has been read."""
        return DecodeCache([mixer_spec(letter).empty_cache() for letter in config.layer_types])

    def advance(self, tokens: int) -> None:
        """Count tokens that have gone through all layers."""
        self.length += tokens

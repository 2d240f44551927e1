"""The two questions that offline evaluations put to a model; whatever answers them can be evaluated.

`mmtrain.infer.answering` answers with the inference engine. Legend: T tokens of a row, N of them that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmtrain.vision.prompt_images import PromptImages


class RowScore(Protocol):
    """What a model says of tokens that are given, each after all those before it."""

    @property
    def log_probs_N(self) -> np.ndarray:
        """In nats, float32."""

    @property
    def likeliest_N(self) -> np.ndarray:
        """Whether each is the token that greedy decoding would take, bool."""


class Answerer(Protocol):
    """A model that continues prompts and scores rows. It is given whole rows, and cuts none of them."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        max_tokens: Sequence[int],
        images: Sequence[PromptImages | None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt with the likeliest tokens.

        Args:
            prompts: int64 [T] each, one token at the least.
            max_tokens: of each, ids to add at most.
            images: of each, where any has some.

        Returns:
            For each prompt the ids that were added, without the end-of-document token that ended them.
        """

    def score(
        self,
        rows: Sequence[np.ndarray],
        starts: Sequence[int],
        images: Sequence[PromptImages | None] | None = None,
    ) -> Sequence[RowScore]:
        """Score the tokens of each row from a place on.

        Args:
            rows: int64 [T] each, two tokens at the least, a document of its own each.
            starts: of each, the place of its first token that is scored, from 1 to T - 1. What lies before is context:
                rows whose context is the same need it read only once.
            images: of each, within its context, where any has some.

        Returns:
            Of each row its last T - start tokens.
        """

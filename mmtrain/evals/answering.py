"""The two questions that offline evaluations put to a model; whatever answers them can be evaluated.

`mmtrain.infer.answering` answers with today's decoding. Legend: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Answerer(Protocol):
    """A model that continues prompts and scores rows. It is given whole rows, and cuts none of them."""

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[list[int]]:
        """Continue each prompt with the likeliest tokens.

        Args:
            prompts: int64 [T] each, one token at the least.
            max_tokens: ids to add at most.

        Returns:
            For each prompt the ids that were added, without the end-of-document token that ended them.
        """

    def score(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the log-probabilities, in nats, of each row's tokens given all those before them.

        Args:
            rows: int64 [T] each, two tokens at the least, a document of its own each. Those of one call may begin
                alike: what they share need be read only once.

        Returns:
            For each row float32 [T - 1], of its second token to its last.
        """

"""A sample of an evaluation that is ready to be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.vision.prompt_images import PromptImages

Figures = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A sample that is ready to be asked.

    Attributes:
        digest: hash of all that is asked and expected.
        rows: one prompt, int64, or the rows to be scored.
        max_tokens: to generate; 0 scores the rows.
        judge: ids that were generated, or the scores of the rows -> figures, `score` (0 to 100) among them.
        facts: figures that are known before.
        starts: of rows that are scored, the place of the first token that is; empty: 1 of each.
        images: decodes the images that all rows begin with; None: text alone.
    """

    digest: str
    rows: list[np.ndarray]
    max_tokens: int
    judge: Callable[[Any], Figures]
    facts: Figures
    starts: tuple[int, ...] = ()
    images: Callable[[], PromptImages | None] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the longest row with its answer."""
        return max(map(len, self.rows)) + self.max_tokens


def digest_of(rows: Sequence[np.ndarray], expected: object = None) -> str:
    """Return the SHA-256 of rows and what is expected."""
    state = hashlib.sha256()
    for row in rows:
        state.update(row.astype("<i8").tobytes())
    state.update(repr(expected).encode())
    return state.hexdigest()

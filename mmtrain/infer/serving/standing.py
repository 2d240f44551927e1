"""Decode steps of the same documents one after the other, which need not be planned anew.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmtrain.infer.serving.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from mmtrain.infer.serving.document import Document


class Standing:
    """Documents that all lacked one token and had a page for it.

    They stay so until one of them leaves, another joins, or the first of them has filled its pages: each gets a token a
    step, and whoever ends, is paused or gives its memory up leaves those at work.

    Args:
        documents: all at work, in their order, if they are so; none otherwise.
        plan: sizes of pages.
    """

    def __init__(self, documents: Sequence[Document], plan: MemoryPlan) -> None:
        self._documents, self._plan = list(documents), plan
        self._fullest = min(documents, key=self._room) if documents else None

    def holds(self, running: list[Document]) -> bool:
        """Tell whether those at work are these still, and all have a page for the token that they lack."""
        fullest = self._fullest
        if fullest is None or running != self._documents:
            return False
        return fullest.remaining == 1 and self._room(fullest) >= 0

    def _room(self, document: Document) -> int:
        """Tokens for which a document's pages have room beside its own; any number where no layer has pages."""
        return len(document.pages) * self._plan.page_tokens - len(document.tokens) if self._plan.paged else 0

"""Which rank has which page, and where in its own memory: arithmetic on the host, in int64. Needs no torch.

Pages go round the ranks, so that a document whose pages follow one another lies on all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PageOwner:
    """One of the ranks that share out pages: page p lies on rank p mod `ranks`, as its own page p // `ranks`.

    Attributes:
        ranks: that share them.
        rank: this one.
        page_tokens: tokens of a page.
    """

    ranks: int
    rank: int
    page_tokens: int

    def place(self, page: int) -> tuple[int, int]:
        """Return the rank that has a page, and the page's number there."""
        return page % self.ranks, page // self.ranks

    def stored(self, pages: Sequence[int], tokens: int) -> tuple[np.ndarray, int]:
        """Find the pages here that hold any of the first tokens of a document.

        Args:
            pages: of the document, in order.
            tokens: so many of its first.

        Returns:
            Their numbers on this rank, int64, in the order of the document, and how many of those tokens they hold.
            All of them but the last are full, so these tokens lie end to end.
        """
        used = np.asarray(pages, dtype=np.int64)[: -(-tokens // self.page_tokens)]
        here = np.flatnonzero(used % self.ranks == self.rank)
        count = len(here) * self.page_tokens
        if len(here) and here[-1] == len(used) - 1:
            count -= len(used) * self.page_tokens - tokens
        return used[here] // self.ranks, count

    def written(self, pages: Sequence[int], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Find those of a document's tokens that lie on this rank.

        Args:
            pages: of the document, in order; none where no layer keeps pages.
            first: position of the first of the tokens.
            count: so many from there on.

        Returns:
            Their numbers among these tokens, from 0 on, and their places in the pages of this rank laid end to end;
            both int64.
        """
        size, position = self.page_tokens, np.arange(first, first + count if len(pages) else first, dtype=np.int64)
        low = first // size
        page = np.asarray(pages[low : -(-(first + count) // size)], dtype=np.int64)[position // size - low]
        here = np.flatnonzero(page % self.ranks == self.rank)
        return here, page[here] // self.ranks * size + position[here] % size

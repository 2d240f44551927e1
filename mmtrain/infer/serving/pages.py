"""The pool of pages: which are free, and how many owners the others have. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PagePool:
    """Pages by number, each owned by none, one or several documents and kept prefixes.

    Attributes:
        owners: of each page.

    Args:
        pages: their number.
        ranks: that share them, a divisor of `pages`: page p lies on rank p mod `ranks` (`page_owner`).
    """

    def __init__(self, pages: int, ranks: int = 1) -> None:
        self.owners = [0] * pages
        self._free = [list(reversed(range(rank, pages, ranks))) for rank in range(ranks)]

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return sum(map(len, self._free))

    def take(self, count: int) -> list[int]:
        """Return so many free pages, each with one owner; the caller knows that they are there.

        Each comes from a rank with the most free ones, the first of them: so ranks have the same number of keys to
        attend to.
        """
        taken = [max(self._free, key=len).pop() for _ in range(count)]
        for page in taken:
            self.owners[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Give pages that have owners one more."""
        for page in pages:
            self.owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take an owner from pages; those that are left without one are free."""
        for page in pages:
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self._free[page % len(self._free)].append(page)

"""Packing, the laying of documents into rows: which pieces make up row i. Only lengths are touched, no token.

A plan answers `pieces(i)`: parallel int64 arrays (documents, starts, lengths), in row order. Plans are pure functions
of (documents and their lengths, row length, seed, i); what they keep, in memory or on disk, is a cache.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry
from mmdata.corpus.documents import Documents
from mmdata.hashing import permuted, salt_of, shuffled
from mmdata.rows.cache import cached
from mmdata.rows.orders import Orders
from mmdata.rows.pieces import Pieces, TokenRanges

WINDOW_DOCUMENTS = 16_384  # documents that best_fit packs together, at least
WINDOWS_KEPT = 16  # windows whose numbers of rows are kept on disk together
WINDOW_ROWS = 256  # and rows' worth of tokens, at least: few half-empty rows are left at a window's end


class Plan(Protocol):
    """Protocol of a packing, for `RowStream`.

    Attributes:
        pads: whether rows may end in padding.
    """

    pads: bool

    def pieces(self, i: int) -> Pieces:
        """Pieces of row i, for any i >= 0; their lengths sum to the row length, or to less where it is padded."""

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows that end within an epoch."""

    def efficiency(self, epoch: int) -> float:
        """Share of real tokens in the rows of an epoch; the rest is padding."""


class ConcatPlan:
    """Shuffled documents end to end, cut at row ends; then an epoch's rows are shuffled.

    Without the second shuffle a batch, which reads neighbouring rows, would be one long document or two.

    Epochs follow one another without a gap: the tokens at an epoch's end that do not fill a row start the row that the
    next epoch's documents complete. So no token is ever dropped or padded; rows 0 to rows_per_epoch(0) - 1 hold each
    token of epoch 0 once, but for that tail, which is under one row.

    Args:
        documents: to be laid into rows.
        row: tokens in a row.
        seed: of the shuffle.
        cache: where orders of many documents are kept.
    """

    pads = False

    def __init__(self, documents: Documents, row: int, seed: int, cache: ArrayCache | None = None) -> None:
        self._row, self._seed, self._total = row, seed, documents.num_tokens
        self._ranges = TokenRanges(documents, seed, cache)

    def pieces(self, i: int) -> Pieces:
        """Pieces of row i, for any i >= 0."""
        place = self._place(i)
        return self._ranges.pieces(place * self._row, (place + 1) * self._row)

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows that end within an epoch (one more in some epochs than in others, as the tail is carried on)."""
        return (epoch + 1) * self._total // self._row - epoch * self._total // self._row

    def efficiency(self, epoch: int) -> float:
        """Share of real tokens in an epoch's rows: always 1, as there is no padding."""
        return 1.0

    def _place(self, i: int) -> int:
        """Place of row i among the rows cut from documents end to end: one that ends within the same epoch."""
        epoch = ((i + 1) * self._row - 1) // self._total
        first = epoch * self._total // self._row
        return first + permuted(i - first, self.rows_per_epoch(epoch), salt_of(self._seed, epoch, 1))


class BestFitPlan:
    """Whole documents first: a document is cut only if it is longer than a row, and every row's end may be padding.

    Shuffled documents are taken in windows of at least 16,384 documents and 256 rows' worth of tokens. Inside a window
    the row-sized parts of long documents are rows of their own; all else goes, longest first, to the row it leaves the
    smallest gap in. Then the window's rows are shuffled. Windows are planned when a row of theirs, or of a later one,
    is first asked for (about 2 microseconds a document), and the last few are kept. Of many documents, the number of
    rows in each window is kept on disk, so that a resumed run need not plan all windows before its own.

    Args:
        documents: to be laid into rows.
        row: tokens in a row.
        seed: of the shuffle.
        cache: where orders of many documents are kept.
        cut: cuts documents into pieces of at most a row, longest first, as `cut_anywhere` does: documents, their
            lengths and the row to pieces.
        cut_version: names what `cut` does, where that is kept on disk.
    """

    pads = True

    def __init__(
        self,
        documents: Documents,
        row: int,
        seed: int,
        cache: ArrayCache | None = None,
        cut: Callable[[np.ndarray, np.ndarray, int], Pieces] | None = None,
        cut_version: Mapping[str, Any] | None = None,
    ) -> None:
        self._documents, self._row, self._seed = documents, row, seed
        self._cut, self._cut_version = cut or cut_anywhere, cut_version or {}
        self._total = documents.num_tokens
        self._orders = Orders(documents, seed, cache)
        per_window = max(WINDOW_DOCUMENTS, -(-WINDOW_ROWS * row * len(documents) // self._total))
        self._windows = max(1, round(len(documents) / per_window))  # in an epoch
        self._ends: list[int] = []  # rows up to and with each window planned so far, over all epochs
        self._plans: dict[int, tuple[Pieces, np.ndarray]] = {}

    def pieces(self, i: int) -> Pieces:
        """Pieces of row i, for any i >= 0."""
        while not self._ends or i >= self._ends[-1]:
            self._extend()
        window = bisect_right(self._ends, i)
        pieces, bounds = cached(self._plans, window, self._plan, keep=8)
        row = i - (self._ends[window - 1] if window else 0)
        a, b = int(bounds[row]), int(bounds[row + 1])
        return Pieces(pieces.documents[a:b], pieces.starts[a:b], pieces.lengths[a:b])

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of an epoch. Plans all epochs up to this one."""
        last = (epoch + 1) * self._windows - 1
        while len(self._ends) <= last:
            self._extend()
        return self._ends[last] - (self._ends[last - self._windows] if epoch else 0)

    def efficiency(self, epoch: int) -> float:
        """Share of real tokens in the rows of an epoch. Plans all epochs up to this one."""
        return self._total / (self.rows_per_epoch(epoch) * self._row)

    def _extend(self) -> None:
        """Count the rows of the next window or, where that has been done and kept, of the next 16."""
        known, cache = len(self._ends), self._orders.cache
        if cache is not None and known % WINDOWS_KEPT == 0:
            kept = cache.find("windows", self._kept_key(known))
            if kept is not None:
                self._ends += kept.arrays["ends"].tolist()
                return
        _, bounds = cached(self._plans, known, self._plan, keep=8)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(bounds) - 1)
        if cache is not None and len(self._ends) % WINDOWS_KEPT == 0:
            first = len(self._ends) - WINDOWS_KEPT
            ends = np.array(self._ends[first:], dtype=np.int64)
            cache.put("windows", self._kept_key(first), Entry({"ends": ends}))

    def _kept_key(self, first: int) -> Mapping[str, Any]:
        return self._orders.key(
            row=self._row, first_window=first, windows=self._windows, best_fit=1, **self._cut_version
        )

    def _plan(self, window: int) -> tuple[Pieces, np.ndarray]:
        """Pieces of a window in row order, and where each row begins and the last ends, int64[rows + 1]."""
        epoch, part = divmod(window, self._windows)
        order = self._orders.places(epoch)
        n = len(order)
        places = order[n * part // self._windows : n * (part + 1) // self._windows]
        pieces = self._cut(self._documents.id_of(places), self._documents.lengths[places], self._row)
        rows = best_fit(pieces.lengths, self._row)
        count = int(rows.max()) + 1
        rank = np.empty(count, dtype=np.int64)
        rank[shuffled(np.arange(count), self._seed, epoch, 1 + part)] = np.arange(count)
        rows = rank[rows]
        by_row = np.argsort(rows, kind="stable")
        bounds = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=count), out=bounds[1:])
        return Pieces(*(array[by_row] for array in pieces)), bounds


def best_fit(lengths: np.ndarray, row: int) -> np.ndarray:
    """Row (numbered from 0) that best-fit decreasing puts each piece in, int64[n].

    `lengths` (int64[n]) must be sorted, longest first, each in 1..row. O(n log row): open rows are found by their gap.
    """
    result = np.empty(len(lengths), dtype=np.int64)
    full = int(np.searchsorted(-lengths, -row, side="right"))  # pieces of exactly a row need no search
    result[:full] = np.arange(full)
    count = full
    gaps: list[int] = []  # sorted, each once
    rows_by_gap: dict[int, list[int]] = {}
    for k, length in enumerate(lengths[full:].tolist(), full):
        at = bisect_left(gaps, length)
        if at == len(gaps):
            gap, target = row, count
            count += 1
        else:
            gap = gaps[at]
            open_rows = rows_by_gap[gap]
            target = open_rows.pop()
            if not open_rows:
                del gaps[at], rows_by_gap[gap]
        result[k] = target
        if gap > length:
            left = gap - length
            if left in rows_by_gap:
                rows_by_gap[left].append(target)
            else:
                rows_by_gap[left] = [target]
                insort(gaps, left)
    return result


def cut_anywhere(documents: np.ndarray, lengths: np.ndarray, row: int) -> Pieces:
    """Cut documents into pieces of at most a row, longest first: row-sized pieces and a remainder of a long one."""
    counts = -(-lengths // row)
    owner = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    starts = number * row
    sizes = np.minimum(lengths[owner] - starts, row)
    order = np.argsort(-sizes, kind="stable")
    return Pieces(documents[owner][order], starts[order], sizes[order])

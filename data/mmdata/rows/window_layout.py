"""Layouts of a window: pieces of documents laid into a given number of rows, end to end or whole where they fit.

Only lengths are touched. A layout names the parts that the pieces are laid in: parallel int64 arrays, in no order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from mmdata.errors import DataError
from mmdata.rows.packing import best_fit


class Parts(NamedTuple):
    """Parts of a window's pieces, int64[n] each.

    Attributes:
        pieces: which piece each is a part of.
        offsets: where it starts in the piece.
        lengths: tokens, at least 1.
        rows: row of the window that it lies in, 0 to R-1.
    """

    pieces: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray


def lay_end_to_end(lengths: np.ndarray, row: int, num_rows: int) -> Parts:
    """Lay pieces end to end and cut them where a row ends.

    Args:
        lengths: int64[n], tokens of each piece; `row` x `num_rows` in sum.
        row: tokens of a row.
        num_rows: R.
    """
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=edges[1:])
    cuts = np.unique(np.concatenate([edges, np.arange(num_rows + 1, dtype=np.int64) * row]))
    begins = cuts[:-1]
    pieces = np.searchsorted(edges, begins, side="right") - 1
    return Parts(pieces, begins - edges[pieces], np.diff(cuts), begins // row)


def lay_best_fit(lengths: np.ndarray, row: int, num_rows: int) -> Parts:
    """Lay pieces whole, longest first, each where it leaves the smallest gap; cut only what does not fit so.

    Of a piece longer than a row, row-sized parts are rows of their own. Where best fit takes more rows than there are,
    the emptiest of them are dissolved and what they held is cut into the largest gaps of the others. So the padding is
    known beforehand, whatever the lengths are, and only the number of cuts depends on them.

    Args:
        lengths: int64[n], tokens of each piece; at most `row` x `num_rows` in sum, and more than a row less.
        row: tokens of a row.
        num_rows: R.

    Raises:
        DataError: more tokens than the rows hold.
    """
    if int(lengths.sum()) > row * num_rows:
        raise DataError(f"{int(lengths.sum())} tokens do not fit into {num_rows} rows of {row}")
    counts = -(-lengths // row)
    pieces = np.repeat(np.arange(len(lengths)), counts)
    offsets = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * row
    sizes = np.minimum(lengths[pieces] - offsets, row)
    order = np.argsort(-sizes, kind="stable")
    laid = Parts(pieces[order], offsets[order], sizes[order], best_fit(sizes[order], row))
    taken = np.bincount(laid.rows, weights=laid.lengths).astype(np.int64)
    return laid if len(taken) <= num_rows else _dissolve(laid, taken, row, num_rows)


def _dissolve(laid: Parts, taken: np.ndarray, row: int, num_rows: int) -> Parts:
    """Cut what the emptiest rows hold into the gaps of the others, until `num_rows` are left.

    Args:
        laid: in more rows than `num_rows`.
        taken: int64[rows], tokens in each row.
        row: tokens of a row.
        num_rows: R.
    """
    by_fill = np.argsort(-taken, kind="stable")
    number = np.empty(len(taken), dtype=np.int64)
    number[by_fill] = np.arange(len(taken))  # the fullest is row 0
    rows = number[laid.rows]
    stays = rows < num_rows
    gaps = [(row - int(tokens), k) for k, tokens in enumerate(taken[by_fill[:num_rows]]) if tokens < row]
    gaps.sort()
    cut: list[tuple[int, int, int, int]] = []
    left = zip(*(array[~stays].tolist() for array in laid[:3]), strict=True)
    for piece, offset, length in sorted(left, key=lambda part: -part[2]):
        while length:
            at = min(bisect_left(gaps, (length, -1)), len(gaps) - 1)  # the smallest that holds it, or the largest
            gap, target = gaps.pop(at)
            part = min(gap, length)
            cut.append((piece, offset, part, target))
            offset, length = offset + part, length - part
            if gap > part:
                insort(gaps, (gap - part, target))
    added = np.array(cut, dtype=np.int64).T
    kept = (laid.pieces[stays], laid.offsets[stays], laid.lengths[stays], rows[stays])
    return Parts(*(np.concatenate([a, b]) for a, b in zip(kept, added, strict=True)))

"""`Mixture`: several streams in fixed proportions, still a pure function of the row number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmdata.errors import DataError
from mmdata.hashing import salt_of
from mmdata.rows.assemble import Row
from mmdata.rows.cache import cached
from mmdata.rows.stream import RowStream

_BITS = 32
_CIRCLE = 1 << _BITS
_STEP = 2_654_435_769  # odd, nearest to 2^32 over the golden ratio: multiples of it fill the circle evenly
_BLOCK = 4096  # rows whose sources are worked out together


class Mixture:
    """Rows out of several streams, each row from one of them.

    Point i of a golden-ratio rotation, (start(seed) + i * step) mod 2^32, falls into one of the arcs that the weights
    cut the circle into; the arc names the source. Counts stay within a few rows of `weight * i` for every i, and the
    number of earlier rows of a source has a closed form, so row i costs the same at any i. The k-th row taken from a
    source is that stream's row k. Where one stream pads its rows, rows of all of them say what of them is real.

    Args:
        streams: with equal `seq_len`.
        weights: not negative, of any sum; a source of weight 0 is never used.
        seed: turns the rotation's start.

    Raises:
        DataError: no stream, numbers that do not match, a bad weight, or different row lengths.
    """

    def __init__(self, streams: Sequence[RowStream], weights: Sequence[float], seed: int) -> None:
        if not streams or len(streams) != len(weights):
            raise DataError(f"a mixture of {len(streams)} streams with {len(weights)} weights: give one weight each")
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise DataError(f"mixture weights are {list(weights)}: they must be 0 or more, and not all 0")
        lengths = sorted({stream.seq_len for stream in streams})
        if len(lengths) > 1:
            raise DataError(f"the streams of a mixture have rows of {lengths} tokens: use one seq_len")
        self.streams, self.weights, self.seed, self.seq_len = tuple(streams), tuple(weights), seed, lengths[0]
        self._pads = any(stream.pads for stream in streams)
        self._start = salt_of(seed) >> (64 - _BITS)
        shares = np.cumsum(np.asarray(weights, dtype=np.float64)) / float(sum(weights))
        self._arcs = [0, *(min(_CIRCLE, round(share * _CIRCLE)) for share in shares.tolist())]
        for k in range(len(weights), 0, -1):  # rounding must not leave the end of the circle to a source of weight 0
            self._arcs[k] = _CIRCLE
            if weights[k - 1] > 0:
                break
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, i: int) -> Row:
        """Row i, for any i >= 0."""
        source, number = self.locate(i)
        row = self.streams[source][number]
        return replace(row, real_tokens=self.seq_len) if self._pads and row.real_tokens is None else row

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the stream that row i comes from, and its row number there.

        Raises:
            IndexError: i is negative.
        """
        if i < 0:
            raise IndexError(f"row {i}: rows are numbered from 0")
        sources, rows = cached(self._blocks, i // _BLOCK, self._block, keep=4)
        return int(sources[i % _BLOCK]), int(rows[i % _BLOCK])

    def first_rows(self, i: int) -> list[Row]:
        """One row of each source that is used in the 4,096 rows from row i on: the first of it there."""
        first: dict[int, int] = {}
        for near in range(i, i + _BLOCK):
            source, row = self.locate(near)
            first.setdefault(source, row)
        return [self.streams[source][row] for source, row in first.items()]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and their row numbers, int64[_BLOCK] each, of one block of rows."""
        first = number * _BLOCK
        start = (self._start + first * _STEP) % _CIRCLE
        points = (start + np.arange(_BLOCK) * _STEP) % _CIRCLE
        sources = np.searchsorted(self._arcs[1:], points, side="right")
        rows = np.empty(_BLOCK, dtype=np.int64)
        below = [self._points_below(arc, first) for arc in self._arcs]
        for source in range(len(self.streams)):
            mine = np.flatnonzero(sources == source)
            rows[mine] = below[source + 1] - below[source] + np.arange(len(mine))
        return sources, rows

    def _points_below(self, arc: int, count: int) -> int:
        """Number of the first `count` points that lie below `arc` (in 0..2^32)."""
        # floor((x + m) / m) - floor((x + m - arc) / m) is 1 exactly where x mod m < arc.
        m = _CIRCLE
        return floor_sum(count, m, _STEP, self._start + m) - floor_sum(count, m, _STEP, self._start + m - arc)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a * i + b) / m) over i in 0..n-1, for non-negative integers, in O(log m) steps."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total

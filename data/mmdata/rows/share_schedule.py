"""`ShareSchedule`: shares of several components of a stream in tokens, over its rows; exact, in closed form.

A stream's rows are cut into segments, in each of which every component's share of the tokens is constant or goes
linearly from one value to another, and each segment into windows. What a component has given before a window is the
integral of its share, rounded down to a token; the component with the most tokens in the segment takes what rounding
leaves, so that a window's tokens are exactly those that its rows hold. So window w costs the same at any w, and no
share drifts however long the stream is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mmdata.errors import DataError

RAMP_WINDOWS = 16  # windows of a segment whose shares change, at least, where it has as many rows


@dataclass(frozen=True)
class Segment:
    """Stretch of a stream's rows.

    Attributes:
        rows: how many; None, for the last segment alone, is without end.
        start, end: share of each component at its first row and behind its last, 1 in sum; equal where `rows` is None.
    """

    rows: int | None
    start: tuple[Fraction, ...]
    end: tuple[Fraction, ...]


@dataclass(frozen=True)
class Window:
    """Neighbouring rows that are packed together.

    Attributes:
        first_row, num_rows: its rows.
        starts, stops: of each component, the tokens that it has given before the window, and with it.
    """

    first_row: int
    num_rows: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]


class ShareSchedule:
    """Windows of a stream and the tokens that each component gives to each.

    Args:
        segments: in order; the last is endless.
        window_rows: rows of a window, about; the windows of a segment are of one size, to a row.
        row_tokens: tokens of documents in a row, on average: the row's length, or less where rows are padded.

    Raises:
        DataError: shares that are negative or not 1 in sum, or segments that do not end in an endless one.
    """

    def __init__(self, segments: Sequence[Segment], window_rows: int, row_tokens: Fraction | int) -> None:
        _check(segments)
        self._segments = [segment for segment in segments if segment.rows != 0]
        self.window_rows, self.row_tokens = window_rows, Fraction(row_tokens)
        self._firsts = [0]  # rows and tokens of each component before each segment
        self._bases = [(0,) * len(segments[0].start)]
        for segment in self._segments[:-1]:
            assert segment.rows is not None
            self._firsts.append(self._firsts[-1] + segment.rows)
            given = self._given(segment, segment.rows)
            self._bases.append(tuple(a + b for a, b in zip(self._bases[-1], given, strict=True)))
        self._counts = [self._num_windows(segment) for segment in self._segments]

    def window(self, row: int) -> Window:
        """Window that holds a row, for any row >= 0."""
        at = max(k for k, first in enumerate(self._firsts) if first <= row)
        segment, inside = self._segments[at], row - self._firsts[at]
        if segment.rows is None:
            start = inside // self.window_rows * self.window_rows
            stop = start + self.window_rows
        else:
            count = self._counts[at]
            number = ((inside + 1) * count - 1) // segment.rows  # the last that starts at this row or before it
            start, stop = segment.rows * number // count, segment.rows * (number + 1) // count
        bounds = (self._base_plus(at, edge) for edge in (start, stop))
        return Window(self._firsts[at] + start, stop - start, *bounds)

    def tokens_before(self, row: int) -> tuple[int, ...]:
        """Tokens of each component in the rows before one, by the shares; exact where a window starts there."""
        at = max(k for k, first in enumerate(self._firsts) if first <= row)
        return self._base_plus(at, row - self._firsts[at])

    def _base_plus(self, at: int, rows: int) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self._bases[at], self._given(self._segments[at], rows), strict=True))

    def _given(self, segment: Segment, rows: int) -> tuple[int, ...]:
        """Tokens of each component in the first `rows` rows of a segment."""
        tokens = self.row_tokens * rows
        bend = Fraction(rows, 2 * segment.rows) if segment.rows else Fraction(0)
        shares = [start + (end - start) * bend for start, end in zip(segment.start, segment.end, strict=True)]
        given = [int(tokens * share) for share in shares]
        given[_main(segment)] += int(tokens) - sum(given)
        return tuple(given)

    def _num_windows(self, segment: Segment) -> int:
        """Windows of a segment: few enough that rounding takes nothing back from any component."""
        if segment.rows is None:
            return 0
        count = max(1, round(segment.rows / self.window_rows))
        if segment.start != segment.end:
            count = max(count, min(RAMP_WINDOWS, segment.rows))
        while count > 1:
            main, edges = _main(segment), (0, segment.rows // count, segment.rows - segment.rows // count, segment.rows)
            given = [self._given(segment, edge)[main] for edge in edges]
            if given[0] <= given[1] and given[2] <= given[3]:
                break
            count //= 2
        return count


def _main(segment: Segment) -> int:
    """Component with the most tokens in a segment."""
    totals = [start + end for start, end in zip(segment.start, segment.end, strict=True)]
    return totals.index(max(totals))


def _check(segments: Sequence[Segment]) -> None:
    for segment in segments:
        for shares in (segment.start, segment.end):
            if min(shares) < 0 or sum(shares) != 1:
                raise DataError(f"shares are {[float(s) for s in shares]}: each must be 0 or more, and their sum 1")
    last = segments[-1]
    if last.rows is not None or last.start != last.end or any(segment.rows is None for segment in segments[:-1]):
        raise DataError("the segments of a schedule of shares must end in an endless one of constant shares")

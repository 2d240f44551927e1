"""Order of the rows of a window in which every stretch of them holds nearly what the whole window does."""

from __future__ import annotations

import numpy as np

from mmdata.hashing import mix_array

_GOLDEN = 2_654_435_769  # nearest odd number to 2^32 over the golden ratio
_NEAR = 64  # rows among which the next one is chosen


def spread_evenly(held: np.ndarray, salt: int) -> np.ndarray:
    """Place of each row in an order that spreads components evenly, int64[R], a permutation. Integers alone decide.

    Rows are sorted by the component that has most of each, and how much, those that are alike by a hash; they are drawn
    from there at the steps of a golden-ratio rotation, which takes from all kinds in turn. Of the next 64 so drawn, the
    one goes first with which the rows up to it come nearest to the window's mixture.

    Args:
        held: int64[R, C], tokens of each component in each row.
        salt: turns ties and the rotation's start.
    """
    num_rows = len(held)
    most = held.argmax(axis=1)
    ties = mix_array(np.arange(num_rows) ^ np.int64(salt >> 2))
    by_content = np.lexsort((ties, held[np.arange(num_rows), most], most))
    points = (np.uint64(salt) + np.arange(num_rows, dtype=np.uint64) * np.uint64(_GOLDEN)) & np.uint64((1 << 32) - 1)
    rank_of_point = np.empty(num_rows, dtype=np.int64)
    rank_of_point[np.argsort(points, kind="stable")] = np.arange(num_rows)
    drawn = by_content[rank_of_point]
    excess = held * num_rows - held.sum(axis=0)  # of each row over the window's mixture, times R
    place = np.empty(num_rows, dtype=np.int64)
    near, so_far = drawn[:_NEAR].copy(), np.zeros(held.shape[1], dtype=np.int64)
    for number in range(num_rows):
        sums = excess[near] + so_far
        best = int(np.abs(sums).sum(axis=1).argmin())
        place[near[best]], so_far = number, sums[best]
        if number + _NEAR < num_rows:
            near[best] = drawn[number + _NEAR]
        else:
            near = np.delete(near, best)
    return place

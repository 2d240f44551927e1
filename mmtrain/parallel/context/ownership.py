"""Ownership tables: which rank of context parallelism has which chunks of a packed row. Host arithmetic alone.

A row is cut into M equal chunks, and every rank owns N = M / R of them, so that memory is even. The work of the softmax
layers is not: a query sees all earlier tokens of its document. Whole numbers throughout, so that all ranks agree.

Legend: M chunks, R ranks, N chunks of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Table = tuple[tuple[int, ...], ...]
"""Chunks of each rank, ascending."""

CLOSE = 1.005
"""Work of the busiest rank over the mean, below which a table is not improved further."""


def contiguous(work_M: np.ndarray, ranks: int) -> Table:
    """Give each rank N neighbouring chunks."""
    count = len(work_M) // ranks
    return tuple(tuple(range(rank * count, (rank + 1) * count)) for rank in range(ranks))


def zigzag(work_M: np.ndarray, ranks: int) -> Table:
    """Give each rank N / 2 chunks from the front and their mirror images from the back (all of N, where N is 1).

    With N = 2 it is the usual table, chunks r and 2 R - 1 - r: even for one document in the row, and for nothing else.
    """
    chunks, count = len(work_M), len(work_M) // ranks
    half, odd = divmod(count, 2)
    front = [list(range(rank * half, (rank + 1) * half)) for rank in range(ranks)]
    middle = [[ranks * half + rank] if odd else [] for rank in range(ranks)]
    return tuple((*f, *m, *(chunks - 1 - c for c in reversed(f))) for f, m in zip(front, middle, strict=True))


def balanced(work_M: np.ndarray, ranks: int) -> Table:
    """Even out the work: exchange chunks between the busiest rank and others, from the table that cuts documents least.

    Starts from :func:`contiguous`, so that chunks of a document stay together where that is even enough; where its
    exchanges end short of it, from the largest chunks shared out first (longest processing time).
    """
    work = [int(w) for w in work_M]
    first = _exchange(work, [list(chunks) for chunks in contiguous(work_M, ranks)])
    if imbalance(work_M, first) <= CLOSE:
        return first
    second = _exchange(work, _largest_first(work, ranks))
    return min(first, second, key=lambda table: imbalance(work_M, table))


TABLES: dict[str, Callable[[np.ndarray, int], Table]] = {
    "balanced": balanced, "zigzag": zigzag, "contiguous": contiguous,
}  # fmt: skip
"""Planners by the names of `parallel.cp_table`: from the work of each chunk and the number of ranks."""


def imbalance(work_M: np.ndarray, table: Table) -> float:
    """Work of the busiest rank over the mean; 1 is even."""
    total = int(np.sum(work_M))
    return max(int(work_M[list(chunks)].sum()) for chunks in table) * len(table) / total if total else 1.0


def causal_work(cu_seqlens: np.ndarray, chunks: int) -> np.ndarray:
    """Pairs of a query and a key that the queries of each chunk see in their documents, int64 [M].

    Args:
        cu_seqlens: offsets of the documents, from 0 to the row's tokens.
        chunks: M, a divisor of the tokens.
    """
    tokens = int(cu_seqlens[-1])
    edges = np.arange(chunks + 1, dtype=np.int64) * (tokens // chunks)
    bounds = np.union1d(cu_seqlens.astype(np.int64), edges)
    begin, end = bounds[:-1], bounds[1:]
    start = cu_seqlens[np.searchsorted(cu_seqlens, begin, side="right") - 1].astype(np.int64)
    low, high = begin - start, end - start  # places in their document, of which each sees itself too
    pairs = (high * (high + 1) - low * (low + 1)) // 2
    work_M = np.zeros(chunks, dtype=np.int64)
    np.add.at(work_M, begin // (tokens // chunks), pairs)
    return work_M


def _largest_first(work: Sequence[int], ranks: int) -> list[list[int]]:
    """Chunks from the largest to the smallest, each to the rank with the least work among those with room."""
    count = len(work) // ranks
    table: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for chunk in sorted(range(len(work)), key=lambda c: (-work[c], c)):
        rank = min((r for r in range(ranks) if len(table[r]) < count), key=lambda r: (load[r], r))
        table[rank].append(chunk)
        load[rank] += work[chunk]
    return table


def _exchange(work: Sequence[int], table: list[list[int]]) -> Table:
    """Exchange a chunk of the busiest rank for one of another, as long as that lowers the larger of their work."""
    load = [sum(work[c] for c in chunks) for chunks in table]
    aim = CLOSE * sum(load) / len(load)
    for _ in range(16 * len(work)):  # each exchange lowers the busiest; a few a rank are enough
        high = max(range(len(load)), key=lambda r: (load[r], -r))
        if load[high] <= aim:
            break
        best: tuple[int, int, int, int] | None = None  # the larger load afterwards, rank, places of both chunks
        for rank in range(len(load)):
            if rank == high:
                continue
            mine, other = np.array([work[c] for c in table[high]]), np.array([work[c] for c in table[rank]])
            shift = mine[:, None] - other[None, :]
            after = np.maximum(load[high] - shift, load[rank] + shift)
            place = int(after.argmin())
            found = int(after.flat[place]), rank, place // len(other), place % len(other)
            best = found if best is None else min(best, found)
        if best is None or best[0] >= load[high]:
            break
        _, rank, i, j = best
        shift = work[table[high][i]] - work[table[rank][j]]
        table[high][i], table[rank][j] = table[rank][j], table[high][i]
        load[high], load[rank] = load[high] - shift, load[rank] + shift
    return tuple(tuple(sorted(chunks)) for chunks in table)

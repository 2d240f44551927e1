"""Blocks of a file in their order, the next ones being read by threads while one is looked at."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

_BLOCK = 4 << 20  # bytes: those under way stay in a processor's cache until they are looked at
_READERS = 3  # reads under way at once: file systems over a network, and disks, answer several sooner than one by one


def blocks_of(path: Path) -> Iterator[memoryview]:
    """Give the bytes of a file, block by block; each is overwritten when the next but a few is asked for.

    A file that grows meanwhile is read as far as it went; one that is cut short, to its new end.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        number, size = file.fileno(), os.fstat(file.fileno()).st_size
        begins = iter(range(0, size, _BLOCK))
        with ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead") as pool:
            under_way: deque[tuple[Future[int], memoryview]] = deque()

            def begin(view: memoryview) -> None:
                for start in islice(begins, 1):
                    under_way.append((pool.submit(_fill, number, view[: size - start], start), view))

            for _ in range(min(_READERS, -(-size // _BLOCK))):
                begin(memoryview(bytearray(min(_BLOCK, size))))
            spare = memoryview(bytearray(min(_BLOCK, size)))
            while under_way:
                read, view = under_way.popleft()
                count = read.result()
                begin(spare)  # so that as many are under way while this one is looked at
                yield view[:count]
                spare = view


def _fill(file: int, view: memoryview, start: int) -> int:
    """Read bytes of a file from an offset on until the view is full or the file ends; how many there were."""
    done = 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], start + done)):
        done += count
    return done

"""Blocks of a file in their order, the next ones being read by threads while one is looked at."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4 << 20  # bytes: those under way stay in a processor's cache until they are looked at
_READERS = 3  # reads under way at once: file systems over a network, and disks, answer several sooner than one by one


def blocks_of(path: Path) -> Iterator[memoryview]:
    """Give the bytes of a file, block by block; each may be overwritten once the next is asked for.

    A file that grows meanwhile is read as far as it went; one that is cut short, to its new end.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        number, size = file.fileno(), os.fstat(file.fileno()).st_size
        count = -(-size // _BLOCK)
        buffers = [memoryview(bytearray(min(_BLOCK, size))) for _ in range(_READERS + 1)]  # one is looked at

        def read(i: int) -> memoryview:
            view = buffers[i % len(buffers)][: size - i * _BLOCK]
            return view[: _fill(number, view, i * _BLOCK)]

        with ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead") as pool:
            under_way = deque(pool.submit(read, i) for i in range(min(_READERS, count)))
            for i in range(count):
                block = under_way.popleft().result()
                if i + _READERS < count:
                    under_way.append(pool.submit(read, i + _READERS))
                yield block


def _fill(file: int, view: memoryview, start: int) -> int:
    """Read bytes of a file from an offset on until the view is full or the file ends; how many there were."""
    done = 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], start + done)):
        done += count
    return done

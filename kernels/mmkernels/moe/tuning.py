"""Every number that trades speed for speed, in one place; results do not depend on them.

All are powers of two. They are read at each launch, so a bench may set them.
"""

from __future__ import annotations

import triton

# Routing.
ROUTE_TILE, ROUTE_MIN_TOKENS, ROUTE_MAX_TOKENS = 4096, 16, 64
"""Logits a program holds, and the bounds of its tokens."""
SCAN_BLOCK, SCAN_WARPS = 1024, 4
"""Token blocks whose counts are summed at a time."""
LIST_TILE, LIST_MAX_BLOCK, LIST_WARPS = 8192, 256, 4
"""Pairs (assignment, expert) a program compares, and the most assignments it places."""
PLACE_BLOCK, PLACE_WARPS = 2048, 8
"""Entries of an expert's list a program holds at a time; at most 16384 (counts are packed into 16 bits)."""

# Permute and unpermute.
ROW_BLOCK = 2048
"""Elements of a row one program moves, where no sum over the row is needed."""
ELEMENTS_PER_THREAD = 16
"""Of a row's block (two loads of 16 bytes a thread in 16-bit dtypes), and of a tile of logits."""
REDUCE_ELEMENTS_PER_THREAD = 32
"""The same for the one kernel whose programs sum over rows, of all K assignments together."""
REDUCE_TILE = 4096
"""Elements of its K rows such a program holds at a time."""
MAX_WARPS = 16


def route_tokens(experts: int) -> int:
    """Tokens of one program of the routing kernels."""
    return max(ROUTE_MIN_TOKENS, min(ROUTE_MAX_TOKENS, ROUTE_TILE // triton.next_power_of_2(experts)))


def list_block(experts: int) -> int:
    """Assignments of one program of the list kernel."""
    return max(16, min(LIST_MAX_BLOCK, LIST_TILE // triton.next_power_of_2(experts)))


def row_block(width: int) -> int:
    """Block of a row of this width: the largest one that divides it, unless that were small."""
    divisor = width & -width
    if divisor >= ROW_BLOCK // 4:
        return min(divisor, ROW_BLOCK)
    return max(16, min(ROW_BLOCK, triton.next_power_of_2(width)))


def reduce_block(width: int, padded_top_k: int) -> int:
    """Block of each of K rows, K rounded up to a power of two."""
    return max(16, min(row_block(width), REDUCE_TILE // padded_top_k))


def warps(elements: int, elements_per_thread: int = ELEMENTS_PER_THREAD) -> int:
    """Warps for a program that holds this many elements."""
    return max(1, min(MAX_WARPS, elements // (32 * elements_per_thread)))

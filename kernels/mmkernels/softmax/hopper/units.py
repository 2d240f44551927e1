"""Units of work of Hopper's kernels for packed softmax attention, and their tiles (`tiles.py` makes the lists).

Programs stay on their multiprocessors and take units from a list that is sorted by work, there and back, so that all
have about as much; the warp that copies fetches a unit's tiles while the one before ends.

Legend: BM queries of a warpgroup or step, BN keys of a block, D head width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
QUERY_FIELDS: gl.constexpr = gl.constexpr(5)
KEY_FIELDS: gl.constexpr = gl.constexpr(6)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """That many barriers in shared memory, each of which waits for so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def turns(units):
    """Turns that a program takes."""
    programs = gl.num_programs(0)
    return (units + programs - 1) // programs


@gluon.jit
def unit_at(turn, units):
    """The unit that this program takes in a turn; `units` or more if there is none."""
    programs, pid = gl.num_programs(0), gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - pid, pid)


@gluon.jit
def read_query_tile(tiles, tile):
    """First query, end of the document's queries, first key, shift, keys of the document."""
    at = tiles + tile * QUERY_FIELDS
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4)


@gluon.jit
def read_key_tile(tiles, tile):
    """First key, end of the document's keys, its first key, first and end of its queries, shift."""
    at = tiles + tile * KEY_FIELDS
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4), gl.load(at + 5)


@gluon.jit
def key_blocks(first, end, shift, keys, ROWS: gl.constexpr, BN: gl.constexpr):
    """Blocks of keys that ROWS queries see, and how many of these all of them see whole."""
    seen = gl.minimum(gl.minimum(first + ROWS, end) + shift, keys)
    return (seen + BN - 1) // BN, gl.minimum(first + shift + 1, keys) // BN


@gluon.jit
def query_unit(
    c: gl.constexpr, tiles, unit, PAIRS: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr
):
    """Warpgroup c's part of a unit: head, first query, end of its document's, shift, keys, and both of `key_blocks`.

    Two HEADS have a warpgroup each; of one head, a warpgroup has half of the queries, and the blocks of both.
    """
    first, end, _key, shift, keys = read_query_tile(tiles, unit // PAIRS)
    blocks, whole = key_blocks(first, end, shift, keys, BM * (3 - HEADS), BN)
    head = unit % PAIRS * HEADS + (c if HEADS == 2 else 0)
    first += 0 if HEADS == 2 else c * BM
    return head, first, end, shift, keys, blocks, whole


@gluon.jit
def query_blocks(key, document, query, query_end, shift, BM: gl.constexpr, KEYS: gl.constexpr):
    """First query that sees one of KEYS keys, blocks of queries from it on, and how many of these need a mask.

    Keys past the end of a document need none: nothing of theirs is written.
    """
    at = key - document
    first = gl.maximum(query, at - shift)
    blocks = (gl.maximum(query_end - first, 0) + BM - 1) // BM
    partly = (gl.maximum(at + KEYS - 1 - shift - first, 0) + BM - 1) // BM
    return first, blocks, partly


@gluon.jit
def masked(s, block, row, shift, keys, S_LAYOUT: gl.constexpr, BN: gl.constexpr):
    """Scores of a block of keys, -inf where a query does not see a key."""
    column = block * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S_LAYOUT))
    last = gl.minimum(row + shift, keys - 1)
    return gl.where(column[None, :] <= last[:, None], s, float("-inf"))

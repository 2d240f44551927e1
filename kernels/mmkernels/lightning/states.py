"""States that segments of a row leave behind, each on its own: what context parallelism gathers, and what lets all
segments of a row be scanned at once.

Shape letters: B batch rows, T tokens, H heads, D width of b, E width of c, C tokens of a chunk, N segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.tile import LOG2E, document_first, dot_add, load_tile, loss_over, walk_base
from mmkernels.lightning.tiling import Tile, Walk, block_width, ceil_div, precision


@triton.jit
def _step(
    state, b_ptr, c_ptr, b_step, c_step, p, first, lost, outof, i, d, e, d_ok, e_ok,
    MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr, MASK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after one more chunk; with MASK_ROWS positions before ``first`` are left out."""
    at = tl.cast(p, tl.int64)
    ok = p + i >= first
    b = load_tile(b_ptr + at * b_step + (i[:, None] * b_step + d[None, :]), ok, d_ok, MASK_ROWS, MASK_D)
    c = load_tile(c_ptr + at * c_step + (i[:, None] * c_step + e[None, :]), ok, e_ok, MASK_ROWS, MASK_E)
    weighted = (c.to(tl.float32) * outof[:, None]).to(c.dtype)
    return dot_add(tl.trans(b), weighted, state - lost * state, PRECISION)


@triton.jit
def states_kernel(
    b_ptr, c_ptr, slopes_ptr, bounds_ptr, local_ptr, b_token, b_head, c_token, c_head,
    tokens, heads, segments, given, length,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, HAS_INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum of exp(-s (end-1-j)) b_j^T c_j`` over the part of a segment's last document that lies in the segment.

    What decays below 2^-30 before the segment ends, or belongs to an earlier document, is not read.
    """
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (E + BE - 1) // BE
    part, head, z = pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads)
    batch, segment = z // given, z % given
    lo = segment * length
    hi = tl.minimum(lo + length, tokens)
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, REVERSE)
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    i, d, e = tl.arange(0, C), tl.arange(0, BD), part * BE + tl.arange(0, BE)
    d_ok, e_ok = d < D, e < E
    first = lo
    if VARLEN:
        first = tl.maximum(first, document_first(bounds_ptr, hi - 1, hi > 0, tokens, HAS_INIT, REVERSE))
    reach = tl.minimum(tl.cast(hi - first, tl.float32), 30.0 / tl.maximum(slope * LOG2E, 1e-30) + 1.0).to(tl.int32)
    outof = tl.exp2(-slope * LOG2E * (C - 1 + SHIFT - i))
    lost = loss_over(slope, C)
    state = tl.zeros([BD, BE], tl.float32)
    # Chunks end where the segment ends; the first one may begin before ``first``.
    begin = hi - (reach + C - 1) // C * C
    if begin < hi:
        state = _step(
            state, b, c, b_step, c_step, begin, first, lost, outof, i, d, e, d_ok, e_ok,
            True, BD != D, E % BE != 0, PRECISION,
        )  # fmt: skip
    for p in tl.range(begin + C, hi, C):
        state = _step(
            state, b, c, b_step, c_step, p, first, lost, outof, i, d, e, d_ok, e_ok,
            False, BD != D, E % BE != 0, PRECISION,
        )  # fmt: skip
    at = ((tl.cast(batch, tl.int64) * segments + segment) * heads + head) * (D * E)
    tl.store(local_ptr + at + d[:, None] * E + e[None, :], state, mask=d_ok[:, None] & e_ok[None, :])


def segment_states(
    b: Tensor, c: Tensor, slopes_H: Tensor, walk: Walk, tile: Tile,
    *, reverse: bool = False, has_init: bool = False, given: int | None = None,
) -> Tensor:  # fmt: skip
    """State that each segment leaves when it starts from zero.

    Args:
        b: [B, T, H, D], last stride 1, rows of the batch one after the other.
        c: [B, T, H, E], likewise.
        slopes_H: fp32 [H].
        walk: segments of the row.
        tile: block shape.
        reverse: from the last token to the first.
        has_init: the first document of the walk goes on from a state before the row.
        given: how many segments of each row to compute; all but the last unless given, the rest is not written.

    Returns:
        fp32 [B, N, H, D, E].
    """
    batch, tokens, heads, d = b.shape
    e = c.shape[3]
    given = walk.segments - 1 if given is None else given
    local = torch.empty(batch, walk.segments, heads, d, e, dtype=torch.float32, device=b.device)
    states_kernel[(batch * given * heads * ceil_div(e, tile.columns),)](
        b, c, slopes_H, walk.bounds, local, b.stride(1), b.stride(2), c.stride(1), c.stride(2),
        tokens, heads, walk.segments, given, walk.length,
        D=d, E=e, C=tile.chunk, BD=block_width(d), BE=tile.columns, REVERSE=reverse, VARLEN=walk.varlen,
        HAS_INIT=has_init, PRECISION=precision(b.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return local

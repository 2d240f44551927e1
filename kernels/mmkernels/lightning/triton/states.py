"""States that segments of a row leave behind, each on its own: what context parallelism gathers, and what lets all
segments of a row be scanned at once.

Shape letters: B batch rows, T tokens, H heads, D width of b, E width of c, C tokens of a chunk, N segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.device.padded_chunks import (
    Slots,
    document_spans,
    slot_opened,
    slot_pad,
    slot_share,
    slot_start,
)
from mmkernels.lightning.device.tile import LOG2E, dot_add, load_tile, loss_over, walk_base
from mmkernels.lightning.triton import choice
from mmkernels.lightning.triton.tiling import Tile, block_width, ceil_div, precision


@triton.jit
def _step(
    state, b_ptr, c_ptr, b_step, c_step, p, first, lost, outof, i, d, e, d_ok, e_ok,
    MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr, MASK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after one more chunk; with MASK_ROWS positions before ``first`` are left out."""
    at = tl.cast(p, tl.int64)
    ok = p + i >= first
    b = load_tile(b_ptr + at * b_step + (i[:, None] * b_step + d[None, :]), ok, d_ok, MASK_ROWS, MASK_D)
    c = load_tile(c_ptr + at * c_step + (i[:, None] * c_step + e[None, :]), ok, e_ok, MASK_ROWS, MASK_E)
    weighted = (c.to(tl.float32) * outof[:, None]).to(c.dtype)
    return dot_add(tl.trans(b), weighted, state - lost * state, PRECISION)


@triton.jit
def document_begin(cu_ptr, documents, position, tokens, REVERSE: tl.constexpr):
    """Position of the walk at which the document of ``position`` begins."""
    token = tokens - 1 - position if REVERSE else position
    begin = position * 0
    for block in range(0, documents, 256):
        lo, hi = document_spans(cu_ptr, block + tl.arange(0, 256), documents, tokens)
        edge = tokens - hi if REVERSE else lo
        begin = tl.maximum(begin, tl.max(tl.where((lo <= token) & (token < hi), edge, 0), axis=0))
    return begin


@triton.jit
def slot_segment(words_ptr, origins_ptr, segment, segments, C: tl.constexpr):
    """Where the last document in a segment of a row of slots begins there, and where the segment ends, in positions."""
    count, share = slot_share(words_ptr, segments)
    lo = segment * share
    hi = tl.minimum(lo + share, count)
    final = tl.load(origins_ptr + tl.maximum(hi - 1, 0))
    opening = tl.where(lo < hi, tl.maximum(lo, slot_opened(final)), 0)
    first = slot_start(tl.load(origins_ptr + opening)) + slot_pad(tl.load(words_ptr + 1 + opening))
    end = slot_start(final) + C
    return tl.where(lo < hi, first, end), end


@triton.jit
def stretch(
    documents_ptr, words_ptr, segment, segments, length, pad, documents, slope, tokens,
    C: tl.constexpr, REVERSE: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Positions of a segment that its state is made of, first and end, and in how many chunks they are read."""
    if SLOTS:
        first, end = slot_segment(words_ptr, documents_ptr, segment, segments, C)
    else:
        first = tl.maximum(segment * length - pad, 0)
        end = tl.minimum((segment + 1) * length - pad, tokens)
        if PACKED:
            first = tl.maximum(first, document_begin(documents_ptr, documents, end - 1, tokens, REVERSE))
    seen = 30.0 / tl.maximum(slope * LOG2E, 1e-30) + 1.0
    return first, end, (tl.minimum((end - first).to(tl.float32), seen).to(tl.int32) + C - 1) // C


@triton.jit
def states_kernel(
    b_ptr, c_ptr, slopes_ptr, documents_ptr, words_ptr, local_ptr, b_token, b_head, c_token, c_head,
    tokens, heads, segments, given, length, pad, documents,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sum of exp(-s (end-1-j)) b_j^T c_j`` over the part of a segment's last document that lies in the segment.

    What decays below 2^-30 before the segment ends, or belongs to an earlier document, is not read. Segments are SLOTS
    of a packed row, or ``length`` positions; then a row is PACKED if it has documents. B_RAW, C_RAW: b, c are SiLU of
    what lies in memory.
    """
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (E + BE - 1) // BE
    part, head, z = pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads)
    batch, segment = z // given, z % given
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    first, hi, chunks = stretch(
        documents_ptr, words_ptr, segment, segments, length, pad, documents, slope, tokens, C, REVERSE, SLOTS, PACKED
    )
    b, b_step = walk_base(b_ptr, batch, head, b_token, b_head, tokens, 0, REVERSE)
    c, c_step = walk_base(c_ptr, batch, head, c_token, c_head, tokens, 0, REVERSE)
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    i, d, e = tl.arange(0, C), tl.arange(0, BD), part * BE + tl.arange(0, BE)
    d_ok, e_ok = d < D, e < E
    outof = tl.exp2(-slope * LOG2E * (C - 1 + SHIFT - i))
    lost = loss_over(slope, C)
    state = tl.zeros([BD, BE], tl.float32)
    # Chunks end where the segment ends; the first one may begin before ``first``.
    begin = hi - chunks * C
    if begin < hi:
        state = _step(
            state, b, c, b_step, c_step, begin, first, lost, outof, i, d, e, d_ok, e_ok,
            True, BD != D, E % BE != 0, PRECISION,
        )  # fmt: skip
    for p in tl.range(begin + C, hi, C, num_stages=STAGES):
        state = _step(
            state, b, c, b_step, c_step, p, first, lost, outof, i, d, e, d_ok, e_ok,
            False, BD != D, E % BE != 0, PRECISION,
        )  # fmt: skip
    at = ((tl.cast(batch, tl.int64) * segments + segment) * heads + head) * (D * E)
    tl.store(local_ptr + at + d[:, None] * E + e[None, :], state, mask=d_ok[:, None] & e_ok[None, :])


def segment_states(
    b: Tensor, c: Tensor, slopes_H: Tensor, tile: Tile, *,
    segments: int, length: int, given: int, pad: int = 0, slots: Slots | None = None, cu_seqlens: Tensor | None = None,
    reverse: bool = False, silu: bool = False,
) -> Tensor:  # fmt: skip
    """State that each segment of a row leaves when it starts from zero.

    Args:
        b: [B, T, H, D], last stride 1, rows of the batch one after the other.
        c: [B, T, H, E], likewise.
        slopes_H: fp32 [H].
        tile: block shape.
        segments: N.
        length: positions of a segment.
        given: how many segments of each row to compute, the first ones; the rest is not written.
        pad: positions by which the first segment is shorter.
        slots: segments are equal shares of these instead.
        cu_seqlens: offsets of the documents of a packed row whose segments are ``length`` positions.
        reverse: from the last token to the first.
        silu: b and c are SiLU of the tensors given; only where ``hopper_takes`` them.

    Returns:
        fp32 [B, N, H, D, E].
    """
    batch, tokens, heads, d = b.shape
    e = c.shape[3]
    local = torch.empty(batch, segments, heads, d, e, dtype=torch.float32, device=b.device)
    words, documents = (
        (None, cu_seqlens) if slots is None else (slots.words_2N[int(reverse)], slots.origins_2N[int(reverse)])
    )
    grid = (batch * given * heads * ceil_div(e, tile.columns),)
    if cu_seqlens is None and choice.hopper_takes((b, c), tile):
        kernel, shape = choice.hopper_launch("states", d, tile.chunk)
        kernel[grid](
            b, c, slopes_H, documents, words, local, b.stride(2), c.stride(2), tokens, heads, segments, given, length,
            pad, b_token=b.stride(1), c_token=c.stride(1), REVERSE=reverse, SLOTS=slots is not None, RAW=silu,
            **shape,
        )  # fmt: skip
        return local
    states_kernel[grid](
        b, c, slopes_H, documents, words, local, b.stride(1), b.stride(2), c.stride(1), c.stride(2),
        tokens, heads, segments, given, length, pad, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        D=d, E=e, C=tile.chunk, BD=block_width(d), BE=tile.columns, REVERSE=reverse, SLOTS=slots is not None,
        PACKED=cu_seqlens is not None, PRECISION=precision(b.dtype),
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return local

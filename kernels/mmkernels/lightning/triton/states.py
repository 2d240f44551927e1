"""States that segments of a row leave behind, each on its own: context parallelism gathers them, and with them all
segments of a row are scanned at once.

Shape letters: B batch rows, T tokens, H heads, D width of b, E width of c, N segments; in kernels K and V for D and E,
BT tokens of a chunk, BK and BV columns of a tile, as in FLA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.device.padded_chunks import PaddedChunks
from mmkernels.lightning.device.span import segment_span
from mmkernels.lightning.device.tile import LOG2E, dot_add, load_tile, one_minus_decay_over, scan_pointer
from mmkernels.lightning.triton import choice
from mmkernels.lightning.triton.choice import Launch
from mmkernels.lightning.triton.tiling import Tile, block_width, ceil_div, precision


@triton.jit
def _step(
    state, b_ptr, c_ptr, b_step, c_step, position, first, one_minus_decay, decay_out, i, k, v, k_ok, v_ok,
    MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr, MASK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after one more chunk; with MASK_ROWS positions before ``first`` are left out."""
    at = tl.cast(position, tl.int64)
    ok = position + i >= first
    b = load_tile(b_ptr + at * b_step + (i[:, None] * b_step + k[None, :]), ok, k_ok, MASK_ROWS, MASK_K)
    c = load_tile(c_ptr + at * c_step + (i[:, None] * c_step + v[None, :]), ok, v_ok, MASK_ROWS, MASK_V)
    weighted = (c.to(tl.float32) * decay_out[:, None]).to(c.dtype)
    return dot_add(tl.trans(b), weighted, state - one_minus_decay * state, PRECISION)


@triton.jit
def states_kernel(
    b_ptr, c_ptr, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends, h_segments, b_token, b_head, c_token, c_head,
    T, H, segments, computed_segments, length, pad, documents,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """``sum of exp(-s (end-1-j)) b_j^T c_j`` over the part of a segment's last document that lies in the segment.

    Tokens that decay below 2^-30 before the segment ends, or belong to an earlier document, are not read. Segments are
    equal numbers of PADDED_CHUNKS of a packed row, or ``length`` positions; then IS_VARLEN says that the row has
    documents, at ``cu_seqlens``.
    """
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (V + BV - 1) // BV
    part, head, unit = pid % PARTS, pid // PARTS % H, pid // (PARTS * H)
    batch, segment = unit // computed_segments, unit % computed_segments
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    first, end, chunks = segment_span(
        cu_seqlens, chunk_starts, chunk_ends, segment, segments, length, pad, documents, slope, T,
        tl.arange(0, 1024), BT, REVERSE, PADDED_CHUNKS, IS_VARLEN, 1024,
    )  # fmt: skip
    b, b_step = scan_pointer((b_ptr, b_head, b_token), batch, head, T, 0, REVERSE)
    c, c_step = scan_pointer((c_ptr, c_head, c_token), batch, head, T, 0, REVERSE)
    SHIFT: tl.constexpr = 1 if REVERSE else 0
    i, k, v = tl.arange(0, BT), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    k_ok, v_ok = k < K, v < V
    decay_out = tl.exp2(-slope * LOG2E * (BT - 1 + SHIFT - i))
    one_minus_decay = one_minus_decay_over(slope, BT)
    state = tl.zeros([BK, BV], tl.float32)
    # Chunks end where the segment ends; the first one may begin before ``first``.
    begin = end - chunks * BT
    if begin < end:
        state = _step(
            state, b, c, b_step, c_step, begin, first, one_minus_decay, decay_out, i, k, v, k_ok, v_ok,
            True, BK != K, V % BV != 0, PRECISION,
        )  # fmt: skip
    for position in tl.range(begin + BT, end, BT, num_stages=NUM_STAGES):
        state = _step(
            state, b, c, b_step, c_step, position, first, one_minus_decay, decay_out, i, k, v, k_ok, v_ok,
            False, BK != K, V % BV != 0, PRECISION,
        )  # fmt: skip
    at = ((tl.cast(batch, tl.int64) * segments + segment) * H + head) * (K * V)
    tl.store(h_segments + at + k[:, None] * V + v[None, :], state, mask=k_ok[:, None] & v_ok[None, :])


def segment_states(
    b: Tensor, c: Tensor, slopes_H: Tensor, tile: Tile, *,
    segments: int, length: int, computed_segments: int, pad: int = 0, padded_chunks: PaddedChunks | None = None,
    cu_seqlens: Tensor | None = None, reverse: bool = False, silu: bool = False,
) -> Tensor:  # fmt: skip
    """State that each segment of a row leaves when it starts from zero.

    Args:
        b: [B, T, H, D], last stride 1, rows of the batch one after the other.
        c: [B, T, H, E], strides as for b.
        slopes_H: fp32 [H].
        tile: block shape.
        segments: N.
        length: positions of a segment.
        computed_segments: how many segments of each row to compute, the first ones; the rest is not written.
        pad: positions by which the first segment is shorter.
        padded_chunks: segments are equal numbers of these chunks instead.
        cu_seqlens: offsets of the documents of a packed row whose segments are ``length`` positions.
        reverse: from the last token to the first.
        silu: b and c are SiLU of the tensors given; only where ``hopper_takes`` them.

    Returns:
        fp32 [B, N, H, D, E].
    """
    batch, tokens, heads, d = b.shape
    e = c.shape[3]
    states_BNHDE = torch.empty(batch, segments, heads, d, e, dtype=torch.float32, device=b.device)
    padded = padded_chunks is not None
    starts, ends = (
        (padded_chunks.starts_2N[int(reverse)], padded_chunks.ends_2N[int(reverse)]) if padded else (None, None)
    )
    grid = (batch * computed_segments * heads * ceil_div(e, tile.columns),)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if choice.hopper_takes((b, c), tile):
        kernel, shape = choice.hopper_launch(Launch.STATES, d, tile.chunk)
        kernel[grid](
            b, c, slopes_H, cu_seqlens, starts, ends, states_BNHDE, b.stride(2), c.stride(2),
            tokens, heads, segments, computed_segments, length, pad, documents, b_token=b.stride(1),
            c_token=c.stride(1), REVERSE=reverse, PADDED_CHUNKS=padded, IS_VARLEN=cu_seqlens is not None,
            APPLY_SILU=silu, **shape,
        )  # fmt: skip
        return states_BNHDE
    states_kernel[grid](
        b, c, slopes_H, cu_seqlens, starts, ends, states_BNHDE, b.stride(1), b.stride(2), c.stride(1), c.stride(2),
        tokens, heads, segments, computed_segments, length, pad, documents,
        K=d, V=e, BT=tile.chunk, BK=block_width(d), BV=tile.columns, REVERSE=reverse, PADDED_CHUNKS=padded,
        IS_VARLEN=cu_seqlens is not None, PRECISION=precision(b.dtype),
        NUM_STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return states_BNHDE

"""Span of a segment: the positions of a scan that the segment's state is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.lightning.device.padded_chunks import (
    count_padded_chunks,
    document_begin_of,
    document_bounds,
    pad_of,
    start_of,
)
from mmkernels.lightning.device.tile import LOG2E


@triton.jit
def document_start(cu_seqlens, documents, position, T, lanes, REVERSE: tl.constexpr, LANES: tl.constexpr):
    """Position of the scan at which the document of ``position`` begins; LANES documents are looked at at a time."""
    token = T - 1 - position if REVERSE else position
    starts = lanes * 0
    for block in range(0, documents, LANES):
        lo, hi = document_bounds(cu_seqlens, block + lanes, documents, T)
        edge = T - hi if REVERSE else lo
        starts = tl.maximum(starts, tl.where((lo <= token) & (token < hi), edge, 0))
    return tl.max(starts, axis=0)


@triton.jit
def padded_chunks_span(chunk_starts, chunk_ends, segment, segments, BT: tl.constexpr):
    """First position of a segment's last document inside the segment, and the segment's end, for PADDED_CHUNKS."""
    num_chunks, chunks_per_segment = count_padded_chunks(chunk_ends, segments)
    lo = segment * chunks_per_segment
    hi = tl.minimum(lo + chunks_per_segment, num_chunks)
    last = tl.load(chunk_starts + tl.maximum(hi - 1, 0))
    begin = tl.where(lo < hi, tl.maximum(lo, document_begin_of(last)), 0)
    first = start_of(tl.load(chunk_starts + begin)) + pad_of(tl.load(chunk_ends + 1 + begin))
    end = start_of(last) + BT
    return tl.where(lo < hi, first, end), end


@triton.jit
def segment_span(
    cu_seqlens, chunk_starts, chunk_ends, segment, segments, length, pad, documents, slope, T, lanes,
    BT: tl.constexpr, REVERSE: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """First position and end of the part of a segment that its state is made of, and in how many chunks it is read.

    That part lies in the segment's last document. Tokens that decay below 2^-30 before the segment ends are not read.
    ``lanes`` are the numbers from 0 to LANES - 1, in a layout of the caller's choice: Gluon wants one.
    """
    if PADDED_CHUNKS:
        first, end = padded_chunks_span(chunk_starts, chunk_ends, segment, segments, BT)
    else:
        first = tl.maximum(segment * length - pad, 0)
        end = tl.minimum((segment + 1) * length - pad, T)
        if IS_VARLEN:
            first = tl.maximum(first, document_start(cu_seqlens, documents, end - 1, T, lanes, REVERSE, LANES))
    seen = 30.0 / tl.maximum(slope * LOG2E, 1e-30) + 1.0
    return first, end, (tl.minimum((end - first).to(tl.float32), seen).to(tl.int32) + BT - 1) // BT

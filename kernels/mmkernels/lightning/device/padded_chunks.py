"""Padded chunks: how the Triton kernels cut a packed row, so that each chunk is inside one document.

A document of n tokens takes ceil(n / BT) chunks of BT positions. Its last chunk ends where the document ends; its first
one begins ``pad`` positions before the document, and those positions are never read or written. So a scan over padded
chunks is a scan over whole chunks of one document after the other, whatever their lengths.

Shape letters: T tokens, BT positions of a chunk, N chunks (at most), S segments, two directions of a scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS_PER_PROGRAM = 128
DOCUMENTS_PER_STEP = 64
"""Documents that a program of `padded_chunks_kernel` counts at a time."""


@dataclass(frozen=True)
class PaddedChunks:
    """The padded chunks of a packed row, on its device, for a forward [0] and a reversed [1] scan.

    Attributes:
        ends_2N: int64 [2, N+1]. First the number of chunks; then for each chunk ``document_end << 6 | pad``: the index
            of the chunk at which its document has ended, and the positions at its beginning that are not the
            document's.
        starts_2N: int64 [2, N], for each chunk ``start << 32 | document_begin``: the position of the scan at which it
            starts (below 0 where a row begins with padding), and the index of the first chunk of its document.
        segment_firsts_S1: int32 [S+1], the first chunk of each of S equal segments of the row, in token order, then the
            number of chunks; where a document begins with every segment, and was asked for.
    """

    ends_2N: Tensor
    starts_2N: Tensor
    segment_firsts_S1: Tensor | None = None


@triton.jit
def document_end_of(chunk_end):
    """Index of the chunk at which the chunk's document has ended, from its entry in ``ends_2N``."""
    return (chunk_end >> 6).to(tl.int32)


@triton.jit
def pad_of(chunk_end):
    """Positions at the beginning of a chunk that are not its document's, from its entry in ``ends_2N``."""
    return (chunk_end & 63).to(tl.int32)


@triton.jit
def start_of(chunk_start):
    """Position of the scan at which a chunk starts, from its entry in ``starts_2N``."""
    return (chunk_start >> 32).to(tl.int32)


@triton.jit
def document_begin_of(chunk_start):
    """Index of the first chunk of the chunk's document, from its entry in ``starts_2N``."""
    return (chunk_start & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def document_bounds(cu_seqlens, index, documents, T):
    """Start and end of documents. The host did not read the offsets: wrong ones must not lead out of the row."""
    ok = index < documents
    lo = tl.minimum(tl.maximum(tl.load(cu_seqlens + index, mask=ok, other=0).to(tl.int32), 0), T)
    hi = tl.minimum(tl.maximum(tl.load(cu_seqlens + index + 1, mask=ok, other=0).to(tl.int32), lo), T)
    return lo, hi


@triton.jit
def count_padded_chunks(chunk_ends, segments):
    """Number of padded chunks of a row, and how many of them each of ``segments`` equal segments has."""
    num_chunks = tl.load(chunk_ends).to(tl.int32)
    return num_chunks, (num_chunks + segments - 1) // segments


@triton.jit
def segment_range(chunk_ends, segment_firsts, segment, REVERSE: tl.constexpr):
    """Half-open range of the padded chunks of a segment, numbered in token order, in scan order; and their number in
    the row. Offsets that lie leave ``segment_firsts`` unwritten: it must not lead out of the row either.
    """
    num_chunks = tl.load(chunk_ends).to(tl.int32)
    lo = tl.minimum(tl.maximum(tl.load(segment_firsts + segment), 0), num_chunks)
    hi = tl.minimum(tl.maximum(tl.load(segment_firsts + segment + 1), lo), num_chunks)
    if REVERSE:
        return num_chunks - hi, num_chunks - lo, num_chunks
    else:
        return lo, hi, num_chunks


@triton.jit
def padded_chunks_kernel(
    cu_seqlens, chunk_ends, chunk_starts, segment_firsts, T, documents, capacity, segments,
    BT: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr, CUT_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Write `PaddedChunks`, BLOCK_CHUNKS chunks a program in both directions; each counts all documents' chunks."""
    chunk = tl.program_id(0) * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
    document = tl.zeros([BLOCK_CHUNKS], tl.int32)
    begin = tl.zeros([BLOCK_CHUNKS], tl.int32)
    num_chunks = tl.program_id(0) * 0
    for block in range(0, documents, BLOCK_DOCUMENTS):
        lo, hi = document_bounds(cu_seqlens, block + tl.arange(0, BLOCK_DOCUMENTS), documents, T)
        # Chunks up to and with each document: where a chunk's own document begins is the largest not past the chunk.
        end = num_chunks + tl.cumsum((hi - lo + BT - 1) // BT, axis=0)
        before = (end[None, :] <= chunk[:, None]) & (block + tl.arange(0, BLOCK_DOCUMENTS)[None, :] < documents)
        document += tl.sum(before.to(tl.int32), axis=1)
        begin = tl.maximum(begin, tl.max(tl.where(before, end[None, :], 0), axis=1))
        num_chunks = tl.max(end, axis=0)
    # More chunks than any row has: the offsets lie, and nothing is scanned.
    num_chunks = tl.where(num_chunks > capacity, 0, num_chunks)
    if tl.program_id(0) == 0:
        tl.store(chunk_ends, num_chunks.to(tl.int64))
        tl.store(chunk_ends + capacity + 1, num_chunks.to(tl.int64))
        if CUT_SEGMENTS:
            tl.store(segment_firsts + segments, num_chunks)
    lo, hi = document_bounds(cu_seqlens, document, documents, T)
    document_chunks = (hi - lo + BT - 1) // BT
    document_pad = document_chunks * BT - (hi - lo)
    nth = chunk - begin
    pad = tl.where(nth == 0, document_pad, 0).to(tl.int64)
    ok = (chunk < num_chunks) & (document < documents)
    if CUT_SEGMENTS:  # a segment begins with the document that begins where it does
        length = T // segments
        tl.store(segment_firsts + lo // length, chunk, mask=ok & (nth == 0) & (lo % length == 0))
    tl.store(chunk_ends + 1 + chunk, ((begin + document_chunks).to(tl.int64) << 6) | pad, mask=ok)
    tl.store(chunk_starts + chunk, ((lo - document_pad + nth * BT).to(tl.int64) << 32) | begin.to(tl.int64), mask=ok)
    mirrored = num_chunks - begin - document_chunks
    ok = ok & (mirrored >= 0) & (mirrored + nth < num_chunks)
    chunk_ends, chunk_starts = chunk_ends + capacity + 2 + mirrored + nth, chunk_starts + capacity + mirrored + nth
    tl.store(chunk_ends, ((mirrored + document_chunks).to(tl.int64) << 6) | pad, mask=ok)
    tl.store(chunk_starts, ((T - hi - document_pad + nth * BT).to(tl.int64) << 32) | mirrored.to(tl.int64), mask=ok)


def pad_documents(cu_seqlens: Tensor, tokens: int, chunk: int, segments: int = 0) -> PaddedChunks:
    """Padded chunks of a packed row, by one small kernel, without a host wait.

    Args:
        cu_seqlens: int32 or int64 offsets of the documents, on a CUDA device.
        tokens: length T of the row, at least 1.
        chunk: positions BT of a chunk, at most 64.
        segments: S, a divisor of the tokens, to find where each of S equal segments begins.
    """
    documents = cu_seqlens.shape[0] - 1
    capacity = tokens // chunk + documents
    ends_2N = torch.empty(2, capacity + 1, dtype=torch.int64, device=cu_seqlens.device)
    starts_2N = torch.empty(2, capacity, dtype=torch.int64, device=cu_seqlens.device)
    firsts_S1 = torch.empty(segments + 1, dtype=torch.int32, device=cu_seqlens.device) if segments else None
    padded_chunks_kernel[(-(-capacity // CHUNKS_PER_PROGRAM),)](
        cu_seqlens.contiguous(), ends_2N, starts_2N, firsts_S1, tokens, documents, capacity, segments,
        BT=chunk, BLOCK_CHUNKS=CHUNKS_PER_PROGRAM, BLOCK_DOCUMENTS=DOCUMENTS_PER_STEP, CUT_SEGMENTS=segments > 0,
    )  # fmt: skip
    return PaddedChunks(ends_2N, starts_2N, firsts_S1)

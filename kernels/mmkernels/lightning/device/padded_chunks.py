"""Slots: the chunks in which the Triton kernels walk a packed row, each inside one document.

A document of n tokens takes ceil(n / C) slots of C positions. Its last slot ends where the document ends; its first one
begins ``pad`` positions before the document, and those positions are never read or written. So a walk over slots is a
walk over whole chunks of one document after the other, whatever their lengths.

Shape letters: T tokens, C positions of a slot, N slots (at most), two directions of a walk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS, _DOCUMENTS = 128, 64  # what one program holds at a time


@dataclass(frozen=True)
class Slots:
    """The slots of a packed row, on its device, for a forward [0] and a reversed [1] walk.

    Attributes:
        words_2N: int64. First the number of slots; then for each ``until << 6 | pad``: the slot at which its document
            has ended, and the positions at its beginning that are not the document's.
        origins_2N: int64, for each slot ``start << 32 | opened``: the position of the walk at which it starts (below
            0 where a row begins with padding), and the first slot of its document.
    """

    words_2N: Tensor
    origins_2N: Tensor


@triton.jit
def slot_until(word):
    """The slot at which a slot's document has ended."""
    return (word >> 6).to(tl.int32)


@triton.jit
def slot_pad(word):
    """Positions at the beginning of a slot that are not its document's."""
    return (word & 63).to(tl.int32)


@triton.jit
def slot_start(origin):
    """Position of the walk at which a slot starts."""
    return (origin >> 32).to(tl.int32)


@triton.jit
def slot_opened(origin):
    """The first slot of a slot's document."""
    return (origin & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def document_spans(cu_ptr, index, documents, tokens):
    """Start and end of documents. The host did not read the offsets: wrong ones must not lead out of the row."""
    ok = index < documents
    lo = tl.minimum(tl.maximum(tl.load(cu_ptr + index, mask=ok, other=0).to(tl.int32), 0), tokens)
    hi = tl.minimum(tl.maximum(tl.load(cu_ptr + index + 1, mask=ok, other=0).to(tl.int32), lo), tokens)
    return lo, hi


@triton.jit
def slot_share(words_ptr, segments):
    """Slots of a row, and how many of them each of ``segments`` equal shares has."""
    count = tl.load(words_ptr).to(tl.int32)
    return count, (count + segments - 1) // segments


@triton.jit
def _slots_kernel(
    cu_ptr, words_ptr, origins_ptr, tokens, documents, capacity,
    C: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Each program writes SLOTS slots, for both directions; it counts the slots of all documents for that."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    document = tl.zeros([SLOTS], tl.int32)
    first = tl.zeros([SLOTS], tl.int32)
    count = tl.program_id(0) * 0
    for block in range(0, documents, DOCUMENTS):
        lo, hi = document_spans(cu_ptr, block + tl.arange(0, DOCUMENTS), documents, tokens)
        # Slots up to and with each document: where a slot's own document begins is the largest not past the slot.
        until = count + tl.cumsum((hi - lo + C - 1) // C, axis=0)
        before = (until[None, :] <= slot[:, None]) & (block + tl.arange(0, DOCUMENTS)[None, :] < documents)
        document += tl.sum(before.to(tl.int32), axis=1)
        first = tl.maximum(first, tl.max(tl.where(before, until[None, :], 0), axis=1))
        count = tl.max(until, axis=0)
    # More slots than any row has: the offsets lie, and nothing is walked.
    count = tl.where(count > capacity, 0, count)
    if tl.program_id(0) == 0:
        tl.store(words_ptr, count.to(tl.int64))
        tl.store(words_ptr + capacity + 1, count.to(tl.int64))
    lo, hi = document_spans(cu_ptr, document, documents, tokens)
    slots = (hi - lo + C - 1) // C
    pad = slots * C - (hi - lo)
    nth = slot - first
    own = tl.where(nth == 0, pad, 0).to(tl.int64)
    ok = (slot < count) & (document < documents)
    tl.store(words_ptr + 1 + slot, ((first + slots).to(tl.int64) << 6) | own, mask=ok)
    tl.store(origins_ptr + slot, ((lo - pad + nth * C).to(tl.int64) << 32) | first.to(tl.int64), mask=ok)
    mirrored = count - first - slots
    ok = ok & (mirrored >= 0) & (mirrored + nth < count)
    words_ptr, origins_ptr = words_ptr + capacity + 2 + mirrored + nth, origins_ptr + capacity + mirrored + nth
    tl.store(words_ptr, ((mirrored + slots).to(tl.int64) << 6) | own, mask=ok)
    tl.store(origins_ptr, ((tokens - hi - pad + nth * C).to(tl.int64) << 32) | mirrored.to(tl.int64), mask=ok)


def document_slots(cu_seqlens: Tensor, tokens: int, chunk: int) -> Slots:
    """Slots of a packed row, by one small kernel, without a host wait.

    Args:
        cu_seqlens: int32 or int64 offsets of the documents, on a CUDA device.
        tokens: length T of the row, at least 1.
        chunk: positions C of a slot, at most 64.
    """
    documents = cu_seqlens.shape[0] - 1
    capacity = tokens // chunk + documents
    words_2N = torch.empty(2, capacity + 1, dtype=torch.int64, device=cu_seqlens.device)
    origins_2N = torch.empty(2, capacity, dtype=torch.int64, device=cu_seqlens.device)
    _slots_kernel[(-(-capacity // _SLOTS),)](
        cu_seqlens.contiguous(), words_2N, origins_2N, tokens, documents, capacity,
        C=chunk, SLOTS=_SLOTS, DOCUMENTS=_DOCUMENTS,
    )  # fmt: skip
    return Slots(words_2N, origins_2N)

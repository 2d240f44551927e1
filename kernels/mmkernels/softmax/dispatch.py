"""Which kernel takes which documents. Capabilities are asked for, never found out by failing.

Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax import eager, full_block
from mmkernels.softmax.backends import cpu, cudnn, hopper
from mmkernels.softmax.hopper.tiles import Documents

BACKENDS = ("auto", "hopper", "cudnn", "flash", "torch")
LONG = 2048
"""Tokens from which on a document goes through cuDNN by itself, with backend="auto", if not to our kernels."""
LONG_BACKWARD = 16384
"""Tokens from which on a document's backward goes through cuDNN where our kernels take the rest.

On an H200 cuDNN reaches 541 TFLOP/s backward with 32K tokens and ours 458; with 8K 512 and 482, but every length that
cuDNN meets for the first time costs the host 55 ms, in which the GPU idles.
"""
LONG_BLOCK = 4096
"""Queries and keys from which on most of a block without a mask is cuDNN's in backward, likewise."""
HOPPER_LEAST = 6 << 20
"""Elements of q from which on our kernels for Hopper are taken, with backend="auto"; fewer go to FlashAttention-2.

A launch of ours costs the host 0.1 ms, as much as the kernels take then: of softmax layers alone, a model of 70M (5.2M
elements) made 347K tokens/s with them and 464K without, one of 410M (8.4M) 122.6K and 113.8K.
"""
HALF_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_MAX_WIDTH = 128
CUDNN_LEAST_KEYS = 2
FLASH_MAX_WIDTH = 256
HOPPER_WIDTHS = (64, 128)


class Block(Protocol):
    """A backend that computes one block: ``cpu``, ``cudnn``, ``eager``, ``hopper`` or :class:`FullBlock`."""

    def forward(self, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exp [H, T]."""

    def backward(
        self, do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv."""


class Piece(NamedTuple):
    """Neighbouring tokens of a row that one call takes.

    Attributes:
        tokens: their place in the row.
        block: what computes them, as one document; None for documents that FlashAttention-2 takes together.
        cu_seqlens: offsets of those documents from the piece's first token, int32; None for one document.
        longest: the longest of them.
        documents: documents that our kernels for Hopper take together; else None.
        alone: tokens of those of them whose backward is one call of cuDNN each.
        others: the rest of them.
    """

    tokens: slice
    block: Block | None
    cu_seqlens: Tensor | None = None
    longest: int = 0
    documents: Documents | None = None
    alone: tuple[slice, ...] = ()
    others: Documents | None = None


class FullBlock:
    """Any sizes of queries and keys, all of which see each other: cuDNN, where it pays, and a kernel for any size.

    That is ours on Hopper, which does all of the forward, and FlashAttention-2 elsewhere.
    """

    @staticmethod
    def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exp [H, T]."""
        if hopper_pays(q_THD):
            return hopper.full_forward(q_THD, k_SGD, v_SGD, scale)
        return full_block.forward(q_THD, k_SGD, v_SGD, cudnn_fits(q_THD), scale)

    @staticmethod
    def backward(
        do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv."""
        given = do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT
        if hopper_pays(q_THD):
            long = min(q_THD.shape[0], k_SGD.shape[0]) >= LONG_BLOCK
            return full_block.backward(*given, long and cudnn_fits(q_THD), scale, hopper.full_backward)
        return full_block.backward(*given, cudnn_fits(q_THD), scale)


def block_for(q_THD: Tensor, k_SGD: Tensor, causal: bool = True) -> Block:
    """The backend for one block of these queries and keys."""
    if q_THD.shape[0] == 0 or k_SGD.shape[0] == 0:
        return eager
    if q_THD.device.type == "cpu":
        return cpu
    if not causal and flash_fits(q_THD):
        return FullBlock
    if hopper_fits(q_THD):
        return hopper
    return cudnn if cudnn_fits(q_THD) and k_SGD.shape[0] >= CUDNN_LEAST_KEYS else eager


def pieces_of(backend: str, q_THD: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> list[Piece]:
    """Cut a row into pieces, in order; documents without tokens may be in none.

    Long documents are pieces by themselves. The others that lie between two of those are one piece: no token is moved.

    Raises:
        KernelArgumentError: the backend is unknown, or cannot take this row.
    """
    if (backend == "hopper" and hopper_fits(q_THD)) or (backend == "auto" and hopper_pays(q_THD)):
        return [_for_hopper(q_THD, tuple(lengths), backend == "auto")] if sum(lengths) else []
    least = _least_for_block(backend, q_THD)
    block = block_for(q_THD, q_THD)
    if backend == "torch" and q_THD.is_cuda:
        block = eager
    pieces: list[Piece] = []
    start, first = 0, 0  # token and document where the documents since the last piece begin
    for i, length in enumerate(lengths):
        if length < least:
            continue
        stop = sum(lengths[first:i], start)
        if stop > start:
            pieces.append(_together(slice(start, stop), cu_seqlens, lengths, first, i))
        pieces.append(Piece(slice(stop, stop + length), block))
        start, first = stop + length, i + 1
    if sum(lengths[first:]):
        pieces.append(_together(slice(start, q_THD.shape[0]), cu_seqlens, lengths, first, len(lengths)))
    return pieces


def _for_hopper(q_THD: Tensor, lengths: tuple[int, ...], cudnn_may: bool) -> Piece:
    """The whole row."""
    row = slice(0, q_THD.shape[0])
    documents = Documents(lengths, lengths, True, q_THD.device)
    long = [i for i, length in enumerate(lengths) if length >= LONG_BACKWARD]
    if not long or not cudnn_may or not cudnn_fits(q_THD):
        return Piece(row, None, documents=documents, others=documents)
    starts = list(accumulate(lengths, initial=0))
    alone = tuple(slice(starts[i], starts[i + 1]) for i in long)
    others = Documents(lengths, lengths, True, q_THD.device, frozenset(long))
    return Piece(row, None, documents=documents, alone=alone, others=others)


def _together(tokens: slice, cu_seqlens: Tensor, lengths: Sequence[int], first: int, last: int) -> Piece:
    offsets = cu_seqlens[first : last + 1].to(torch.int32)
    return Piece(tokens, None, offsets - tokens.start if tokens.start else offsets, max(lengths[first:last]))


def _least_for_block(backend: str, q_THD: Tensor) -> float:
    """The length from which on a document is a piece by itself."""
    if backend not in BACKENDS:
        raise KernelArgumentError("backend", repr(backend), ", ".join(BACKENDS))
    if backend == "auto":
        if hopper_fits(q_THD):
            return torch.inf  # few tokens: one call
        if flash_fits(q_THD):
            return max(LONG, CUDNN_LEAST_KEYS) if cudnn_fits(q_THD) else torch.inf
        return 1
    for name, fits in (("hopper", hopper_fits), ("cudnn", cudnn_fits), ("flash", flash_fits)):
        if backend == name and not fits(q_THD):
            got = f"{q_THD.dtype} heads of {q_THD.shape[2]} on {q_THD.device}"
            raise KernelArgumentError("q_THD", got, f"what backend={name!r} takes: see kernels/mmkernels/softmax")
    return {"flash": torch.inf, "cudnn": CUDNN_LEAST_KEYS, "torch": 1}[backend]


def hopper_fits(q_THD: Tensor) -> bool:
    """Whether our kernels for Hopper take documents and blocks of this: bfloat16 heads of 64 or 128."""
    return (
        q_THD.is_cuda
        and q_THD.dtype == torch.bfloat16
        and q_THD.shape[2] in HOPPER_WIDTHS
        and torch.cuda.get_device_capability(q_THD.device) == (9, 0)
        and hopper.is_available()
    )


def hopper_pays(q_THD: Tensor) -> bool:
    """Whether they take these, and there are enough of them."""
    return math.prod(q_THD.shape) >= HOPPER_LEAST and hopper_fits(q_THD)


def cudnn_fits(q_THD: Tensor) -> bool:
    """Whether cuDNN takes blocks of this: 16-bit heads up to 128 wide, on Hopper or later."""
    return (
        _half_on_cuda(q_THD)
        and q_THD.shape[2] <= CUDNN_MAX_WIDTH
        and torch.cuda.get_device_capability(q_THD.device)[0] >= 9
        and torch.backends.cudnn.is_available()
        and torch.backends.cudnn.version() >= 90000
        and not torch.are_deterministic_algorithms_enabled()  # its backward adds up in any order
    )


def flash_fits(q_THD: Tensor) -> bool:
    """Whether torch's FlashAttention-2 takes documents of this: 16-bit heads up to 256 wide, on Ampere or later."""
    return (
        _half_on_cuda(q_THD)
        and q_THD.shape[2] <= FLASH_MAX_WIDTH
        and torch.cuda.get_device_capability(q_THD.device)[0] >= 8
        and torch.backends.cuda.is_flash_attention_available()
    )


def _half_on_cuda(q_THD: Tensor) -> bool:
    return q_THD.is_cuda and q_THD.dtype in HALF_DTYPES and q_THD.shape[2] % 8 == 0

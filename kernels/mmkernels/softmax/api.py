"""The public functions of softmax attention: checks and dispatch.

Legend: T tokens or queries, S keys, H heads, G key/value heads, D head width, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.softmax import merge
from mmkernels.softmax.checks import check_causal, check_lengths, check_parts, check_qkv, check_results
from mmkernels.softmax.dispatch import Piece, block_for, pieces_of
from mmkernels.softmax.packed import PackedAttention, packed_gradients


def softmax_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    pieces: list[Piece] | None = None,
) -> Tensor:
    """Causal softmax attention inside each document of a packed row: ``o_i = sum_{j<=i} softmax_j(scale q_i.k_j) v_j``.

    Args:
        q_THD: queries [T, H, D], float32, bfloat16, float16 or float64; read in place where tokens lie outermost and
            the last dimension is contiguous, else copied.
        k_TGD: keys [T, G, D], in the dtype of q; query head h reads key/value head ``h // (H / G)``.
        v_TGD: values [T, G, D], in the same way.
        cu_seqlens: int32 or int64 [N+1], offsets of the documents, from 0 to T; documents may be empty.
        lengths: the same as N lengths on the host, which must know them; None reads them from ``cu_seqlens``, and the
            host then waits for the device.
        scale: factor of the scores; None is ``D ** -0.5``.
        backend: "flash" (all documents in one call of FlashAttention-2), "cudnn" (each document by itself, those of one
            token through FlashAttention-2), "torch", or "auto": on CUDA, 16-bit documents of at least ``dispatch.LONG``
            tokens through cuDNN and the others through FlashAttention-2, as far as the device and D allow; else torch.
        pieces: of :func:`softmax_pieces` for these documents, which need be found once for all layers; None finds them.

    Returns:
        o_THD, contiguous, in the dtype of q. Gradients flow to q, k and v; there are no second derivatives.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    return softmax_attention_with_lse(
        q_THD, k_TGD, v_TGD, cu_seqlens, lengths, scale=scale, backend=backend, pieces=pieces
    )[0]


def softmax_pieces(q_THD: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], *, backend: str = "auto") -> list[Piece]:
    """Pieces that :func:`softmax_attention` cuts a row into, each with the kernel that takes it.

    Args:
        q_THD: queries, of which dtype, D and device count.
        cu_seqlens: as for :func:`softmax_attention`, as are the others.

    Raises:
        KernelArgumentError: the backend is unknown, or cannot take this row.
    """
    return pieces_of(backend, q_THD, cu_seqlens, lengths)


def softmax_attention_with_lse(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    pieces: list[Piece] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`softmax_attention`, and the natural log-sum-exp of each query's scaled scores.

    Returns:
        ``(o_THD, lse_HT)``; lse is float32 (float64 for float64 inputs) and carries no gradient.
    """
    check_qkv(q_THD, k_TGD, v_TGD, ("q_THD", "k_TGD", "v_TGD"))
    host_lengths = check_lengths(q_THD, k_TGD, cu_seqlens, lengths)
    if pieces is None:
        pieces = pieces_of(backend, q_THD, cu_seqlens, host_lengths)
    if not pieces:
        return _nothing(q_THD, k_TGD, v_TGD)
    rows = (tokens_outermost(x) for x in (q_THD, k_TGD, v_TGD))
    return PackedAttention.apply(*rows, pieces, _scale(scale, q_THD))


def softmax_packed_backward(
    do_THD: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    o_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int] | None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that the keys of a packed row add, given the output and log-sum-exp over *all* keys of its queries.

    With the output and log-sum-exp of :func:`softmax_attention_with_lse` these are its gradients; where queries have
    seen further keys (:func:`softmax_merge`), they are the row's part of them.

    Args:
        do_THD: gradient of the output, shape and dtype of q.
        q_THD: as in :func:`softmax_attention`, as are all others that are not named here.
        k_TGD: see there.
        v_TGD: see there.
        o_THD: joined output of the queries, shape and dtype of q.
        lse_HT: joined log-sum-exp, float32 (float64 for float64 inputs).
        cu_seqlens: see there.
        lengths: see there.
        scale: see there.
        backend: see there.

    Returns:
        ``(dq_THD, dk_TGD, dv_TGD)`` in the dtype of q; no autograd.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_qkv(q_THD, k_TGD, v_TGD, ("q_THD", "k_TGD", "v_TGD"))
    check_results(do_THD, q_THD, o_THD, lse_HT)
    host_lengths = check_lengths(q_THD, k_TGD, cu_seqlens, lengths)
    pieces = pieces_of(backend, q_THD, cu_seqlens, host_lengths)
    if not pieces:
        return tuple(torch.zeros_like(x) for x in (q_THD, k_TGD, v_TGD))
    rows = [tokens_outermost(x.detach()) for x in (do_THD, q_THD, k_TGD, v_TGD, o_THD)]
    return packed_gradients(rows, lse_HT.detach(), pieces, _scale(scale, q_THD))


def softmax_merge(
    o_THD: Tensor, lse_HT: Tensor, part_THD: Tensor, part_lse_HT: Tensor, *, backend: str = "auto"
) -> None:
    """Join the results that a block of keys has (`part`) to those of other keys, in place.

    ``lse = log(exp(lse_1) + exp(lse_2))``, ``o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2``, in float32 (float64 if
    anything is). A log-sum-exp of -inf adds nothing; two of them stay -inf and leave 0.

    Args:
        o_THD: output [T, H, D], float32, bfloat16, float16 or float64; any strides with a contiguous last dimension.
            Rounded once a call: where many parts follow one another, keep it wider than they are.
        lse_HT: log-sum-exp [H, T], float32 (float64 for float64 outputs); any strides.
        part_THD: output of the block, of the same shape and device.
        part_lse_HT: log-sum-exp of the block, of the shape and dtype of `lse_HT`.
        backend: "triton", "torch", or "auto": Triton on CUDA, except for float64, else torch.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_parts(o_THD, lse_HT, part_THD, part_lse_HT)
    run = merge.merge
    if use_triton(backend, "o_THD", o_THD) and part_THD.dtype != torch.float64:
        from mmkernels.softmax.merge_launch import merge as run  # only this path needs Triton
    if o_THD.numel():
        run(o_THD, lse_HT, part_THD.detach(), part_lse_HT.detach())


def softmax_forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one block of queries and one of keys of the same document, without autograd: a ring's step.

    Results of several blocks of keys join by :func:`softmax_merge`.

    Args:
        q_THD: queries [T, H, D], dtypes as for :func:`softmax_attention`.
        k_SGD: keys [S, G, D].
        v_SGD: values [S, G, D].
        causal: whether query i sees keys up to i alone (then S must be T), or all of them.
        scale: factor of the scores; None is ``D ** -0.5``.

    Returns:
        ``(o_THD, lse_HT)`` as for :func:`softmax_attention_with_lse`; without keys 0 and -inf.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_qkv(q_THD, k_SGD, v_SGD, ("q_THD", "k_SGD", "v_SGD"))
    check_causal(q_THD, k_SGD, causal)
    q, k, v = (tokens_outermost(x.detach()) for x in (q_THD, k_SGD, v_SGD))
    return block_for(q, k, causal).forward(q, k, v, causal, _scale(scale, q))


def softmax_backward(
    do_THD: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    o_THD: Tensor,
    lse_HT: Tensor,
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that one block of keys adds, given the output and log-sum-exp over *all* blocks of keys.

    dq is summed over the blocks of keys; dk and dv over the blocks of queries.

    Args:
        do_THD: gradient of the output, shape and dtype of q.
        q_THD: as in :func:`softmax_forward`.
        k_SGD: as in :func:`softmax_forward`.
        v_SGD: as in :func:`softmax_forward`.
        o_THD: joined output of the queries, shape and dtype of q.
        lse_HT: joined log-sum-exp, float32 (float64 for float64 inputs).
        causal: as in :func:`softmax_forward`.
        scale: as in :func:`softmax_forward`.

    Returns:
        ``(dq_THD, dk_SGD, dv_SGD)`` in the dtype of q.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_qkv(q_THD, k_SGD, v_SGD, ("q_THD", "k_SGD", "v_SGD"))
    check_causal(q_THD, k_SGD, causal)
    check_results(do_THD, q_THD, o_THD, lse_HT)
    do, q, k, v, o = (tokens_outermost(x.detach()) for x in (do_THD, q_THD, k_SGD, v_SGD, o_THD))
    return block_for(q, k, causal).backward(do, q, k, v, o, lse_HT.detach(), causal, _scale(scale, q))


def _scale(scale: float | None, q_THD: Tensor) -> float:
    return q_THD.shape[2] ** -0.5 if scale is None else scale


def tokens_outermost(x_THD: Tensor) -> Tensor:
    """The tensor itself if its tokens lie outermost and its last dimension is contiguous, else a copy."""
    by_token, by_head, by_column = x_THD.stride()
    in_place = by_column == 1 and by_head >= x_THD.shape[2] and by_token >= by_head * x_THD.shape[1]
    return x_THD if in_place else x_THD.contiguous()


def _nothing(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """The results of a row without tokens, with gradients as empty."""
    o_THD = q_THD + 0 * (k_TGD.sum() + v_TGD.sum())
    return o_THD, q_THD.new_zeros(q_THD.shape[1], 0, dtype=torch.promote_types(q_THD.dtype, torch.float32))

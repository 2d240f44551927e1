"""Causal attention of the last tokens of each of several documents, whose keys are all at hand, in one call.

The mask is aligned at the bottom right: the last query of a document sees all of its keys, the one before it all but
one. Our kernels for Hopper, or FlashAttention-2, do all documents at once, where they take the tensors; elsewhere, and
for a piece of one long document where cuDNN is the fastest, a document is a block without a mask and a causal one,
which are joined.

Legend: T queries and S keys of all documents, H heads, G key/value heads, D head width, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax.api import softmax_backward, softmax_forward, softmax_merge, tokens_outermost
from mmkernels.softmax.backends import flash, hopper
from mmkernels.softmax.checks import check_qkv, check_results
from mmkernels.softmax.dispatch import LONG, cudnn_fits, flash_fits, hopper_pays
from mmkernels.softmax.hopper.tiles import Documents

_INDEXED = (1 << 31) - 1  # elements of keys that cuDNN is given: whether it counts more in 64 bits is not known


@dataclass(frozen=True)
class Suffixes:
    """Documents of which the last tokens have queries here.

    Attributes:
        queries: of each document, 1 at least.
        keys: of each document, as many as its queries at least.
        cu_queries: int32 [N+1], offsets of the queries, on the device.
        cu_keys: int32 [N+1], offsets of the keys, likewise.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor

    def __post_init__(self) -> None:
        """Refuse a document with fewer keys than queries, or without any."""
        queries, keys = self.queries, self.keys
        if len(queries) != len(keys) or any(q < 1 or q > k for q, k in zip(queries, keys, strict=True)):
            raise KernelArgumentError("keys", list(self.keys), f"at least the queries {list(self.queries)} of each")
        for name, x in (("cu_queries", self.cu_queries), ("cu_keys", self.cu_keys)):
            if x.dtype != torch.int32 or list(x.shape) != [len(self.keys) + 1]:
                raise KernelArgumentError(name, f"{x.dtype} {list(x.shape)}", f"int32 [{len(self.keys) + 1}]")

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries of a document, and the most keys."""
        return max(self.queries, default=0), max(self.keys, default=0)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Queries and keys of all."""
        return sum(self.queries), sum(self.keys)

    @cached_property
    def for_hopper(self) -> Documents:
        """What our kernels for Hopper take, with lists on the device that are made once."""
        return Documents(self.queries, self.keys, True, self.cu_queries.device)

    def slices(self) -> Iterator[tuple[slice, slice, slice]]:
        """Queries of each document, its keys that all of them see, and those that are causal."""
        query = key = 0
        for queries, keys in zip(self.queries, self.keys, strict=True):
            edge = key + keys - queries
            yield slice(query, query + queries), slice(key, edge), slice(edge, edge + queries)
            query, key = query + queries, key + keys


def softmax_suffix_forward(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, documents: Suffixes, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of each document, without autograd.

    Args:
        q_THD: queries, document by document, float32, bfloat16, float16 or float64.
        k_SGD: keys of each document from its first token on, in the dtype of q; G divides H.
        v_SGD: values, likewise.
        documents: how many queries and keys each has.
        scale: factor of the scores; None is ``D ** -0.5``.

    Returns:
        Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32 (float64 for float64 inputs).

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check(q_THD, k_SGD, v_SGD, documents)
    q_THD, k_SGD, v_SGD = (tokens_outermost(x.detach()) for x in (q_THD, k_SGD, v_SGD))
    if hopper_pays(q_THD) and documents.queries:
        scale = q_THD.shape[2] ** -0.5 if scale is None else scale
        return hopper.forward_documents(q_THD, k_SGD, v_SGD, documents.for_hopper, scale)
    if flash_fits(q_THD) and documents.queries and not _pays_alone(q_THD, k_SGD, documents):
        (queries, keys), scale = documents.longest, q_THD.shape[2] ** -0.5 if scale is None else scale
        cu_queries, cu_keys = documents.cu_queries, documents.cu_keys
        return flash.forward(q_THD, k_SGD, v_SGD, cu_queries, queries, scale, cu_keys, keys)
    parts = [_of_document(q_THD[rows], k_SGD, v_SGD, seen, causal, scale) for rows, seen, causal in documents.slices()]
    if len(parts) == 1:
        return parts[0]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    none = torch.empty_like(q_THD[:0]), q_THD.new_empty(q_THD.shape[1], 0, dtype=wide)
    outputs, lses = zip(none, *parts, strict=True)
    return torch.cat(outputs), torch.cat(lses, dim=1)


def _pays_alone(q_THD: Tensor, k_SGD: Tensor, documents: Suffixes) -> bool:
    """Whether a document is faster as a block that all queries see and a causal one, of which cuDNN takes the most.

    cuDNN computes 1.7 times as fast as FlashAttention-2, but plans a graph for every size that it meets. So it gets the
    pieces of a long prompt alone, which all have one size: a round number of queries, and keys before them.
    """
    if len(documents.queries) != 1 or not cudnn_fits(q_THD):
        return False
    (queries, keys), longest = documents.longest, _INDEXED // k_SGD.stride(0)
    return queries % LONG == 0 and keys <= longest


def _of_document(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seen: slice, causal: slice, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a document, given its queries, and the keys that all of them see and that some do."""
    if len(q_THD) == 1:  # a single query sees all keys: no mask and nothing to join
        keys = slice(seen.start, causal.stop)
        return softmax_forward(q_THD, k_SGD[keys], v_SGD[keys], False, scale)
    o_THD, lse_HT = softmax_forward(q_THD, k_SGD[causal], v_SGD[causal], True, scale)
    if seen.stop > seen.start:
        o_THD, lse_HT = o_THD.contiguous(), lse_HT.contiguous()
        softmax_merge(o_THD, lse_HT, *softmax_forward(q_THD, k_SGD[seen], v_SGD[seen], False, scale))
    return o_THD, lse_HT


def softmax_suffix_backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, documents: Suffixes,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`softmax_suffix_forward`, from its results.

    Args:
        do_THD: gradient of the output, shape and dtype of q.
        q_THD: as there, as are all others that are not named here.
        k_SGD: see there.
        v_SGD: see there.
        o_THD: the output.
        lse_HT: the log-sum-exp.
        documents: see there.
        scale: see there.

    Returns:
        ``(dq_THD, dk_SGD, dv_SGD)`` in the dtype of q.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check(q_THD, k_SGD, v_SGD, documents)
    check_results(do_THD, q_THD, o_THD, lse_HT)
    do_THD, q_THD, k_SGD, v_SGD, o_THD = (tokens_outermost(x.detach()) for x in (do_THD, q_THD, k_SGD, v_SGD, o_THD))
    if hopper_pays(q_THD) and documents.queries:
        scale = q_THD.shape[2] ** -0.5 if scale is None else scale
        rows = do_THD, q_THD, k_SGD, v_SGD, o_THD
        return hopper.backward_documents(*rows, lse_HT, documents.for_hopper, scale)
    if flash_fits(q_THD) and documents.queries:
        (queries, keys), scale = documents.longest, q_THD.shape[2] ** -0.5 if scale is None else scale
        cu_queries, cu_keys = documents.cu_queries, documents.cu_keys
        return flash.backward(do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT, cu_queries, queries, scale, cu_keys, keys)
    dq_THD, dk_SGD, dv_SGD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_SGD, v_SGD))
    for rows, seen, causal in documents.slices():
        given = do_THD[rows], q_THD[rows]
        joined = o_THD[rows], lse_HT[:, rows]
        for keys, masked in ((causal, True), (seen, False)):
            if keys.stop > keys.start:
                dq, dk_SGD[keys], dv_SGD[keys] = softmax_backward(
                    *given, k_SGD[keys], v_SGD[keys], *joined, causal=masked, scale=scale
                )
                dq_THD[rows] = dq if masked else dq_THD[rows] + dq
    return dq_THD, dk_SGD, dv_SGD


def _check(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, documents: Suffixes) -> None:
    check_qkv(q_THD, k_SGD, v_SGD, ("q_THD", "k_SGD", "v_SGD"))
    for name, x, tokens in zip(("q_THD", "k_SGD"), (q_THD, k_SGD), documents.tokens, strict=True):
        if x.shape[0] != tokens:
            raise KernelArgumentError(name, f"{x.shape[0]} tokens", f"those of the documents, {tokens}")
    for name, x in (("cu_queries", documents.cu_queries), ("cu_keys", documents.cu_keys)):
        if x.device != q_THD.device:
            raise KernelArgumentError(name, f"device {x.device}", f"that of q_THD, {q_THD.device}")

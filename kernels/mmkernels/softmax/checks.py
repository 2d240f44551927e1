"""Argument checks of softmax attention. They run before any work and, beside what is said, never wait for a GPU.

Legend: T tokens or queries, S keys, H heads, G key/value heads, D head width, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmkernels.common.checks import check_beside, check_kind, check_tensor
from mmkernels.common.errors import KernelArgumentError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str]) -> None:
    """Refuse queries, keys and values that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    for name, x in zip(names, (q, k, v), strict=True):
        check_kind(name, x, 3, DTYPES)
        _check_beside(name, x, names[0], q)
    heads, width = q.shape[1:]
    if not heads or not width:
        raise KernelArgumentError(names[0], f"shape {list(q.shape)}", "at least one head of one column")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise KernelArgumentError(names[1], f"{k.shape[1]} heads", f"a number that divides the {heads} heads of q")
    if k.shape[2] != width:
        raise KernelArgumentError(names[1], f"heads of width {k.shape[2]}", f"{width}, that of q")
    if v.shape != k.shape:
        raise KernelArgumentError(names[2], f"shape {list(v.shape)}", f"that of {names[1]}, {list(k.shape)}")


def check_lengths(
    q_THD: Tensor, k_TGD: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | None
) -> tuple[int, ...]:  # fmt: skip
    """Documents' lengths as host integers, read from ``cu_seqlens`` (waiting for its device) when not given.

    Raises:
        KernelArgumentError: they do not fit the offsets or the row.
    """
    tokens = q_THD.shape[0]
    if k_TGD.shape[0] != tokens:
        raise KernelArgumentError("k_TGD", f"{k_TGD.shape[0]} tokens", f"as many as q has, {tokens}")
    check_kind("cu_seqlens", cu_seqlens, 1, (torch.int32, torch.int64))
    if cu_seqlens.shape[0] < 2:
        raise KernelArgumentError("cu_seqlens", f"shape {list(cu_seqlens.shape)}", "[N+1] with at least one document")
    if cu_seqlens.device != q_THD.device:
        raise KernelArgumentError("cu_seqlens", f"device {cu_seqlens.device}", f"the device of q_THD, {q_THD.device}")
    if lengths is None or cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        found = tuple(hi - lo for lo, hi in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != tokens or min(found) < 0:
            raise KernelArgumentError("cu_seqlens", f"offsets {offsets}", f"0 to {tokens}, never decreasing")
        if lengths is not None and tuple(lengths) != found:
            raise KernelArgumentError("lengths", list(lengths), f"those of cu_seqlens, {list(found)}")
        return found
    if len(lengths) != cu_seqlens.shape[0] - 1:
        raise KernelArgumentError("lengths", f"{len(lengths)} lengths", f"{cu_seqlens.shape[0] - 1}, as in cu_seqlens")
    if min(lengths) < 0 or sum(lengths) != tokens:
        raise KernelArgumentError("lengths", list(lengths), f"lengths >= 0 that sum to the {tokens} tokens")
    return tuple(lengths)


def check_causal(q_THD: Tensor, k_SGD: Tensor, causal: bool) -> None:
    """Refuse a causal block that is not square, where two alignments would be possible."""
    if causal and q_THD.shape[0] != k_SGD.shape[0]:
        raise KernelArgumentError("causal", f"True with {q_THD.shape[0]} queries, {k_SGD.shape[0]} keys", "as many")


def check_results(do_THD: Tensor, q_THD: Tensor, o_THD: Tensor, lse_HT: Tensor) -> None:
    """Refuse an output, its gradient or its log-sum-exp that does not belong to the queries."""
    for name, x in (("do_THD", do_THD), ("o_THD", o_THD)):
        check_kind(name, x, 3, DTYPES)
        _check_beside(name, x, "q_THD", q_THD)
        if x.shape != q_THD.shape:
            raise KernelArgumentError(name, f"shape {list(x.shape)}", f"that of q_THD, {list(q_THD.shape)}")
    check_kind("lse_HT", lse_HT, 2, (torch.promote_types(q_THD.dtype, torch.float32),))
    shape = [q_THD.shape[1], q_THD.shape[0]]
    if list(lse_HT.shape) != shape or lse_HT.device != q_THD.device:
        raise KernelArgumentError("lse_HT", f"{list(lse_HT.shape)} on {lse_HT.device}", f"{shape} on {q_THD.device}")


def check_parts(o_THD: Tensor, lse_HT: Tensor, part_THD: Tensor, part_lse_HT: Tensor) -> None:
    """Refuse results of two blocks of keys that do not belong to the same queries."""
    check_tensor("o_THD", o_THD, 3, DTYPES)
    if o_THD.requires_grad:
        raise KernelArgumentError("o_THD", "requires_grad=True", "a tensor outside autograd, which is written to")
    check_beside("part_THD", part_THD, o_THD.shape, DTYPES, "o_THD", o_THD)
    wide = torch.promote_types(torch.promote_types(o_THD.dtype, part_THD.dtype), torch.float32)
    shape = [o_THD.shape[1], o_THD.shape[0]]
    for name, x in (("lse_HT", lse_HT), ("part_lse_HT", part_lse_HT)):
        check_kind(name, x, 2, (wide,))
        if list(x.shape) != shape or x.device != o_THD.device:
            raise KernelArgumentError(name, f"{list(x.shape)} on {x.device}", f"{shape} on {o_THD.device}")


def _check_beside(name: str, x: Tensor, q_name: str, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise KernelArgumentError(name, f"dtype {x.dtype}", f"the dtype of {q_name}, {q.dtype}")
    if x.device != q.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of {q_name}, {q.device}")

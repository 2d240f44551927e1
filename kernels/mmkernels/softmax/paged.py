"""The decode step of softmax attention over keys in pages: one new token a document, read where its keys lie.

Legend: N documents, H heads, G key/value heads, D head width, P pages, L tokens of a page, M pages of a document at
most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import check_beside, check_kind, use_triton
from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax.api import softmax_forward
from mmkernels.softmax.checks import DTYPES, check_qkv

MAX_WIDTH = 256


@torch.no_grad()
def softmax_paged_step(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, k_PLGD: Tensor, v_PLGD: Tensor, table_NM: Tensor, keys_N: Tensor,
    scale: float | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add each document's new token to its pages, and attend from it to all of the document's keys.

    With "triton" nothing but the keys is read, and the host reads nothing: the call can be recorded in a CUDA graph
    whose tables and lengths change.

    Args:
        q_NHD: query of each new token, float32, bfloat16, float16 or float64.
        k_NGD: its key, in the dtype of q; G divides H.
        v_NGD: its value, likewise.
        k_PLGD: pages of keys, in the dtype of q, written to.
        v_PLGD: pages of values, likewise, of the same strides.
        table_NM: int64, the pages of each document in order; those past its end count for nothing.
        keys_N: int64, tokens of each document, the new one with them. 0 stands for no document: nothing of it is read
            or written, its output is 0 and its log-sum-exp -inf.
        scale: factor of the scores; None is ``D ** -0.5``.
        backend: "triton", "torch" (the host waits for the device), or "auto": Triton on CUDA for D up to 256, but for
            float64.

    Returns:
        Output [N, H, D] in the dtype of q, and log-sum-exp [N, H], float32 (float64 for float64 inputs).

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    _check(q_NHD, k_NGD, v_NGD, k_PLGD, v_PLGD, table_NM, keys_N)
    scale = q_NHD.shape[-1] ** -0.5 if scale is None else scale
    given = q_NHD, k_NGD, v_NGD, k_PLGD, v_PLGD, table_NM, keys_N, scale
    if use_triton(backend, "q_NHD", q_NHD, MAX_WIDTH):
        from mmkernels.softmax.paged_launch import step  # only this path needs Triton

        return step(*given)
    return _torch_step(*given)


def _torch_step(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, k_PLGD: Tensor, v_PLGD: Tensor, table_NM: Tensor, keys_N: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o_NHD = q_NHD.new_zeros(q_NHD.shape)
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    lse_NH = torch.full(q_NHD.shape[:2], -torch.inf, dtype=wide, device=q_NHD.device)
    page = k_PLGD.shape[1]
    for n, keys in enumerate(keys_N.tolist()):
        if keys:
            pages_M = table_NM[n, : -(-keys // page)]
            last, place = pages_M[-1], (keys - 1) % page
            k_PLGD[last, place], v_PLGD[last, place] = k_NGD[n], v_NGD[n]
            k_SGD, v_SGD = (x_PLGD[pages_M].flatten(0, 1)[:keys] for x_PLGD in (k_PLGD, v_PLGD))
            o_NHD[n : n + 1], lse_H1 = softmax_forward(q_NHD[n : n + 1], k_SGD, v_SGD, False, scale)
            lse_NH[n] = lse_H1[:, 0]
    return o_NHD, lse_NH


def _check(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, k_PLGD: Tensor, v_PLGD: Tensor, table_NM: Tensor, keys_N: Tensor
) -> None:
    check_qkv(q_NHD, k_NGD, v_NGD, ("q_NHD", "k_NGD", "v_NGD"))
    documents, dtypes = q_NHD.shape[0], (q_NHD.dtype,)
    if k_NGD.shape[0] != documents:
        raise KernelArgumentError("k_NGD", f"{k_NGD.shape[0]} tokens", f"as many as q_NHD has, {documents}")
    check_kind("k_PLGD", k_PLGD, 4, DTYPES)
    for name, x in (("k_PLGD", k_PLGD), ("v_PLGD", v_PLGD)):
        check_beside(name, x, torch.Size((*k_PLGD.shape[:2], *k_NGD.shape[1:])), dtypes, "k_NGD", k_NGD)
    if v_PLGD.stride() != k_PLGD.stride():
        raise KernelArgumentError(
            "v_PLGD", f"strides {list(v_PLGD.stride())}", f"those of k_PLGD, {list(k_PLGD.stride())}"
        )
    for name, x in (("q_NHD", q_NHD), ("k_NGD", k_NGD), ("v_NGD", v_NGD)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise KernelArgumentError(name, f"strides {list(x.stride())}", "a contiguous last dimension (stride 1)")
    for name, x, ndim in (("table_NM", table_NM, 2), ("keys_N", keys_N, 1)):
        check_kind(name, x, ndim, (torch.int64,))
        if x.shape[0] != documents or x.device != q_NHD.device:
            raise KernelArgumentError(name, f"{x.shape[0]} documents on {x.device}", f"{documents} on {q_NHD.device}")
    if table_NM.shape[1] > 1 and table_NM.stride(1) != 1:
        raise KernelArgumentError("table_NM", f"strides {list(table_NM.stride())}", "contiguous rows")

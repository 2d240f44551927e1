"""The public function of lightning attention: checks, choice of backend, dispatch.

A backend is one file and one entry in ``BACKENDS``. It takes checked arguments and returns the output in the input
dtype with the final state, or None for the state when it was not asked for.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning.checks import check_attention, check_projection, state_dtype
from mmkernels.lightning.eager.autograd import chunked_lightning_attention
from mmkernels.lightning.naive import naive_lightning_attention

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, bool],
    tuple[Tensor, Tensor | None],
]


def lightning_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    slopes_H: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    row_state: bool = False,
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a decay per head, forward and (by autograd) backward.

    ``o_t = sum over j <= t in t's document of exp(-s (t-j)) (q_t . k_j) v_j``, which is ``o_t = q_t S_t`` with
    ``S_t = exp(-s) S_{t-1} + k_t^T v_t`` (MiniMax-01 paper 2.2.2). No scale factor, no softmax, no denominator.

    Args:
        q_BTHD: queries [B, T, H, D], float32, bfloat16, float16 or float64, any strides.
        k_BTHD: keys [B, T, H, D] of the dtype of q.
        v_BTHD: values [B, T, H, E] of the dtype of q; E may differ from D.
        slopes_H: decay slopes >= 0, float32 (or float64) [H]. Constants: no gradient. Under tensor parallelism the
            caller passes the slice that belongs to its heads.
        cu_seqlens: int32 or int64 [N+1], offsets of the N documents of one packed row (B must be 1). Documents may
            have any length, 0 included; nothing crosses from one to the next.
        initial_state: state before the first token, float32 [N or B, H, D, E] (float64 for float64 inputs); zeros
            when None. Gradient flows to it.
        output_final_state: also return the state after the last token of each document or batch row. With no
            initial state this is the local state that LASP+ gathers. Gradient flows from it.
        row_state: with ``cu_seqlens``, the states belong to the row, shape [1, H, D, E]: the initial one to the
            document of the first token, the final one to that of the last. This is a rank's view under context
            parallelism, where a document may begin before the row and go on after it.
        backend: "auto" or a key of ``BACKENDS``: "triton" (heads up to 256 wide, not float64), "chunked" or "naive".
        check_values: whether to check the values in ``slopes_H`` and ``cu_seqlens``, not only their shapes. None
            means on CPU tensors only, because reading values from a GPU makes the host wait for it.

    Returns:
        ``(o [B, T, H, E] in the input dtype, final state in the dtype and shape of initial_state, or None)``.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_attention(q_BTHD, k_BTHD, v_BTHD, slopes_H, cu_seqlens, initial_state, check_values, row_state)
    run = BACKENDS[resolve_backend(backend, q_BTHD, q_BTHD.shape[3], v_BTHD.shape[3])]
    return run(q_BTHD, k_BTHD, v_BTHD, slopes_H, cu_seqlens, initial_state, output_final_state, row_state)


def silu_lightning_attention(
    qkv_BTHX: Tensor,
    slopes_H: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
    check_values: bool | None = None,
) -> Tensor:
    """Lightning attention of ``q, k, v = SiLU(qkv)`` straight from a layer's fused projection, without split or copy.

    On CUDA SiLU's derivative is applied where the gradients of q, k and v are written, in the layout of the projection.

    Args:
        qkv_BTHX: raw projection [B, T, H, 3K]: for each head K columns of q, of k and of v, as in the released code.
        slopes_H: decay slopes, as for :func:`lightning_attention`.
        cu_seqlens: offsets of the documents of one packed row, as for :func:`lightning_attention`.
        recompute: keep the projection alone and compute its SiLU again in backward. That halves what this call keeps
            and costs one more pass over the projection; where a whole block is recomputed anyway, it saves nothing. The
            torch backends always keep SiLU's result.
        backend: as for :func:`lightning_attention`.
        check_values: as for :func:`lightning_attention`.

    Returns:
        o [B, T, H, K] in the dtype of the projection.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_projection(qkv_BTHX, slopes_H, cu_seqlens, check_values)
    width = qkv_BTHX.shape[3] // 3
    name = resolve_backend(backend, qkv_BTHX, width, width)
    if name == "triton":
        from mmkernels.lightning.triton.autograd import triton_silu_attention

        return triton_silu_attention(qkv_BTHX, slopes_H, cu_seqlens, recompute)
    q, k, v = F.silu(qkv_BTHX).chunk(3, dim=3)
    return BACKENDS[name](q, k, v, slopes_H, cu_seqlens, None, False, False)[0]


def resolve_backend(name: str, q: Tensor, *widths: int) -> str:
    """Name of the backend that runs a call; "auto" is the fastest that can: Triton on CUDA, torch elsewhere.

    Raises:
        KernelArgumentError: the name is unknown.
    """
    if name == "auto":
        fits = q.dtype != torch.float64 and max(widths) <= TRITON_WIDTH
        return "triton" if q.is_cuda and fits else "chunked"
    if name not in BACKENDS:
        raise KernelArgumentError("backend", repr(name), ", ".join(["auto", *BACKENDS]))
    return name


def _naive(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    row_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The float64 recurrence, cast back to the dtypes that the public function promises."""
    row = cu_seqlens is not None and row_state
    if row:
        nonempty = (cu_seqlens.diff() > 0).nonzero()[:, 0].tolist() or [0]
        if initial_state is not None:
            before = initial_state.new_zeros(nonempty[0], *initial_state.shape[1:])
            after = initial_state.new_zeros(cu_seqlens.shape[0] - 2 - nonempty[0], *initial_state.shape[1:])
            initial_state = torch.cat([before, initial_state, after])
    o_BTHE, final = naive_lightning_attention(q_BTHD, k_BTHD, v_BTHE, slopes_H, cu_seqlens, initial_state)
    final = final[nonempty[-1] : nonempty[-1] + 1] if row else final
    return o_BTHE.to(q_BTHD.dtype), final.to(state_dtype(q_BTHD.dtype)) if output_final_state else None


def _triton(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Triton backend, imported when it is first asked for: the package works without Triton, on CPUs."""
    from mmkernels.lightning.triton.autograd import triton_lightning_attention

    return triton_lightning_attention(*arguments)


TRITON_WIDTH = 256
BACKENDS: dict[str, Backend] = {"triton": _triton, "chunked": chunked_lightning_attention, "naive": _naive}

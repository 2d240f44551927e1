"""Lightning attention of some equal chunks of a row, each with a state before it and one behind it: what context
parallelism runs on a rank, without autograd, so that states can travel between the passes.

    plan = ChunkPlan.of(...)                                       once a micro-batch: how documents run through chunks
    states = lightning_segment_states(k, v, ..., segments=N)       what each chunk leaves on its own: gathered, then
    before = states_between(states, slopes, plan)                  the state that enters each of this rank's chunks
    o, saved = chunks_forward(q, k, v, ..., before)
    dstates = lightning_segment_states(q, do, ..., reverse=True)   gradients of the states before the chunks: gathered
    chunks_backward(..., lambda: states_between(dstates, slopes, plan, reverse=True))

Shape letters: T tokens, H heads, D width of q and k, E width of v, N chunks here, M chunks of the row, C tokens of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.lightning.api import resolve_backend
from mmkernels.lightning.checks import check_attention, check_chunk_gradients, check_chunks, check_states
from mmkernels.lightning.chunk_plan import ChunkPlan
from mmkernels.lightning.eager.chunks import eager_chunks_backward, eager_chunks_forward, eager_states_between

Grads = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def chunks_forward(
    q_1THD: Tensor,
    k_1THD: Tensor,
    v_1THE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor,
    initial_NHDE: Tensor,
    *,
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of N equal chunks of T / N tokens, each of which goes on from a state of its own.

    A chunk's state serves its first document; documents that begin inside of a chunk begin from zero.

    Args:
        q_1THD: queries [1, T, H, D], any floating dtype, as for ``lightning_attention``.
        k_1THD: keys [1, T, H, D].
        v_1THE: values [1, T, H, E].
        slopes_H: decay slopes, fp32 [H].
        cu_seqlens: int32 or int64 offsets of the documents' parts: every chunk begins one.
        initial_NHDE: state before each chunk, fp32 (float64 for float64 inputs); zeros where a document begins with it.
        backend: "auto" or a name of ``lightning_attention``'s.
        check_values: as for ``lightning_attention``.

    Returns:
        ``(o [1, T, H, E] in the input dtype, tensors to hand to chunks_backward)``.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_attention(q_1THD, k_1THD, v_1THE, slopes_H, cu_seqlens, None, check_values)
    check_chunks(q_1THD, v_1THE, cu_seqlens, initial_NHDE, check_values)
    if _is_triton(backend, q_1THD, v_1THE):
        from mmkernels.lightning.triton.chunks import triton_chunks_forward

        return triton_chunks_forward(q_1THD, k_1THD, v_1THE, slopes_H, cu_seqlens, initial_NHDE)
    return eager_chunks_forward(q_1THD, k_1THD, v_1THE, slopes_H, cu_seqlens, initial_NHDE)


@torch.no_grad()
def chunks_backward(
    q_1THD: Tensor,
    k_1THD: Tensor,
    v_1THE: Tensor,
    do_1THE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor,
    initial_NHDE: Tensor,
    final_gradient: Callable[[], Tensor],
    saved: tuple[Tensor, ...],
    grads: Grads,
    *,
    raw: Grads | None = None,
    backend: str = "auto",
) -> None:
    """Write the gradients of q, k and v, given that of the output and those of the states behind the chunks.

    Args:
        q_1THD: as in :func:`chunks_forward`, and so are k, v, slopes, offsets and states.
        k_1THD: keys.
        v_1THE: values.
        do_1THE: gradient of the output.
        slopes_H: decay slopes.
        cu_seqlens: offsets.
        initial_NHDE: states before the chunks.
        final_gradient: gives the gradients of the states behind the chunks, [N, H, D, E] of their dtype. It is called
            when they are needed, which on a GPU is after dq was launched: they may be on their way until then.
        saved: of :func:`chunks_forward`.
        grads: where dq, dk and dv are written, in the dtype of q; any strides with a last one of 1.
        raw: tensors whose SiLU q, k and v are; then the gradients are those of the raw tensors.
        backend: as in :func:`chunks_forward`.

    Raises:
        KernelArgumentError: a gradient or a raw tensor does not fit; the message names it and what is allowed.
    """
    check_chunk_gradients((q_1THD, k_1THD, v_1THE), do_1THE, grads, raw)
    if _is_triton(backend, q_1THD, v_1THE):
        from mmkernels.lightning.triton.chunks import triton_chunks_backward

        return triton_chunks_backward(
            q_1THD, k_1THD, v_1THE, do_1THE, slopes_H, initial_NHDE, final_gradient, saved, grads, raw
        )
    return eager_chunks_backward(
        q_1THD, k_1THD, v_1THE, do_1THE, slopes_H, cu_seqlens, initial_NHDE, final_gradient, saved, grads, raw
    )


@torch.no_grad()
def states_between(
    states_MHDE: Tensor, slopes_H: Tensor, plan: ChunkPlan, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """State that enters each wanted chunk of a row, from what every chunk leaves on its own (LASP+ with decay).

    ``S_c = M_{c-1} + exp(-s C) S_{c-1}`` where a document runs through chunk c - 1, ``M_{c-1}`` where its last document
    began in it, 0 where the document begins with chunk c (FACTS: MiniMax-01 section 3.2.2 gives the sum without decay).
    With ``reverse`` the same from the end: gradients of the states behind chunks, from those of the states before them.
    One order of adding for all ranks, so that a chunk's state does not depend on who wants it, to the bit.

    Args:
        states_MHDE: [M, H, D, E] of ``lightning_segment_states``, in the order of the plan's places.
        slopes_H: decay slopes, fp32 [H].
        plan: how documents run through the chunks, and which states are wanted; on the device of the states.
        reverse: from the end of the row to its beginning.
        backend: as in :func:`chunks_forward`.

    Returns:
        [N, H, D, E] of the wanted chunks, in the dtype of the states.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_states(states_MHDE, slopes_H, plan.num_chunks, plan.steps_2L3)
    if resolve_backend(backend, states_MHDE, *states_MHDE.shape[2:]) == "triton" and states_MHDE.numel():
        from mmkernels.lightning.triton.states_between import triton_states_between

        return triton_states_between(states_MHDE, slopes_H, plan, reverse)
    return eager_states_between(states_MHDE, slopes_H, plan, reverse)


def _is_triton(backend: str, q_1THD: Tensor, v_1THE: Tensor) -> bool:
    return resolve_backend(backend, q_1THD, q_1THD.shape[3], v_1THE.shape[3]) == "triton" and q_1THD.numel() > 0

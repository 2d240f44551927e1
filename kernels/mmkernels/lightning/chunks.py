"""Lightning attention of some equal chunks of a row, each with a state before it and one behind it: what context
parallelism runs on a rank, without autograd, so that states can travel between the passes.

    states = lightning_segment_states(k, v, ..., segments=N)       what each chunk leaves on its own: gathered, then
    before = states_between(...)                                   the state that enters each of this rank's chunks
    o, saved = chunks_forward(q, k, v, ..., before)
    dstates = lightning_segment_states(q, do, ..., reverse=True)   gradients of the states before the chunks: gathered
    chunks_backward(..., lambda: states_between(..., reverse=True))

Shape letters: T tokens, H heads, D width of q and k, E width of v, N chunks here, M chunks of the row, C tokens of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmkernels.lightning.checks import check_attention, check_chunks
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
        grads: where dq, dk and dv are written; any strides with a last one of 1.
        raw: tensors whose SiLU q, k and v are; then the gradients are those of the raw tensors.
        backend: as in :func:`chunks_forward`.
    """
    eager_chunks_backward(
        q_1THD, k_1THD, v_1THE, do_1THE, slopes_H, cu_seqlens, initial_NHDE, final_gradient, saved, grads, raw
    )


@torch.no_grad()
def states_between(
    states_MHDE: Tensor,
    slopes_H: Tensor,
    chunk_tokens: int,
    through_M: Sequence[bool],
    enters_M: Sequence[bool],
    wanted: Sequence[int],
    place_M: Sequence[int],
    *,
    reverse: bool = False,
) -> Tensor:
    """State that enters each wanted chunk of a row, from what every chunk leaves on its own (LASP+ with decay).

    ``S_c = M_{c-1} + exp(-s C) S_{c-1}`` where a document runs through chunk c - 1, ``M_{c-1}`` where its last document
    began in it, 0 where the document begins with chunk c (FACTS: MiniMax-01 section 3.2.2 gives the sum without decay).
    With ``reverse`` the same from the end: gradients of the states behind chunks, from those of the states before them.
    One order of adding for all ranks, so that a chunk's state does not depend on who wants it, to the bit.

    Args:
        states_MHDE: [M, H, D, E] of ``lightning_segment_states``, in any order of chunks.
        slopes_H: decay slopes, fp32 [H].
        chunk_tokens: C.
        through_M: whether a document runs through each chunk, from before it to behind it.
        enters_M: whether the document of each chunk's first token began before the chunk.
        wanted: numbers of the chunks whose states are wanted.
        place_M: where each chunk's state lies in `states_MHDE`.
        reverse: from the end of the row to its beginning.

    Returns:
        [len(wanted), H, D, E] in the dtype of the states.
    """
    return eager_states_between(
        states_MHDE, slopes_H, chunk_tokens, through_M, enters_M, wanted, place_M, reverse=reverse
    )

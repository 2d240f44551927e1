"""States that the segments of a row leave behind: the parts that context parallelism gathers and adds up.

Shape letters: B batch rows, T tokens, H heads, D width of k, E width of v, N segments, L tokens of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning.api import resolve_backend
from mmkernels.lightning.checks import check_attention, state_dtype
from mmkernels.lightning.eager.documents import document_ids


@torch.no_grad()
def lightning_segment_states(
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    *,
    segments: int = 1,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
    check_values: bool | None = None,
) -> Tensor:
    """State that each of N equal segments of a row leaves when it starts from zero, without a gradient.

    Forward, ``sum over j of exp(-s (L-1-j)) k_j^T v_j`` with j counted from the segment's start, over the tokens of its
    last document. With ``reverse``, ``sum over j of exp(-s (j+1)) k_j^T v_j`` over its first document: given q and the
    gradient of the output, the segment's part of the gradient of the state before it. The state that enters a segment
    is the sum of what earlier ones leave, each decayed by ``exp(-s L)`` for each segment in between, as far as one
    document reaches (LASP+, MiniMax-01 section 3.2.2 with the decay that the paper leaves out).

    Args:
        k_BTHD: keys [B, T, H, D] (queries with ``reverse``), any floating dtype.
        v_BTHE: values [B, T, H, E] (gradients of the output with ``reverse``).
        slopes_H: decay slopes, fp32 [H].
        segments: N, a divisor of T.
        cu_seqlens: offsets of the documents of a packed row (B = 1).
        reverse: backward in time.
        backend: "auto", "triton", or any other name of ``lightning_attention`` for plain torch.
        check_values: as for ``lightning_attention``.

    Returns:
        [B, N, H, D, E] in token order, float32 (float64 for float64 inputs).

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_attention(k_BTHD, k_BTHD, v_BTHE, slopes_H, cu_seqlens, None, check_values)
    tokens = k_BTHD.shape[1]
    if segments < 1 or tokens % segments:
        raise KernelArgumentError("segments", segments, f"a divisor of the {tokens} tokens of a row")
    if resolve_backend(backend, k_BTHD, k_BTHD.shape[3], v_BTHE.shape[3]) == "triton" and k_BTHD.numel():
        from mmkernels.lightning.triton.autograd import triton_segment_states

        return triton_segment_states(k_BTHD, v_BTHE, slopes_H, segments, cu_seqlens, reverse)
    return _torch_segment_states(k_BTHD, v_BTHE, slopes_H, segments, cu_seqlens, reverse)


def _torch_segment_states(
    k_BTHD: Tensor, v_BTHE: Tensor, slopes_H: Tensor, segments: int, cu_seqlens: Tensor | None, reverse: bool
) -> Tensor:
    """One product for all segments; a token outside of the segment's last (reversed: first) document weighs 0."""
    acc, length = state_dtype(k_BTHD.dtype), k_BTHD.shape[1] // segments
    steps_L = torch.arange(length, device=k_BTHD.device, dtype=torch.float64)
    steps_L = steps_L + 1 if reverse else steps_L.flip(0)
    weight_NLH = torch.exp(-slopes_H.double() * steps_L[:, None]).expand(segments, -1, -1)
    if cu_seqlens is not None and length:
        ids_NL = document_ids(cu_seqlens, k_BTHD.shape[1]).view(segments, length)
        counted_NL = ids_NL == (ids_NL[:, :1] if reverse else ids_NL[:, -1:])
        weight_NLH = weight_NLH * counted_NL[:, :, None]
    k_BNLHD = k_BTHD.unflatten(1, (segments, length)).to(acc) * weight_NLH.to(acc)[..., None]
    v_BNLHE = v_BTHE.unflatten(1, (segments, length)).to(acc)
    with torch.autocast(k_BTHD.device.type, enabled=False):
        return torch.einsum("bnlhd,bnlhe->bnhde", k_BNLHD, v_BNLHE)

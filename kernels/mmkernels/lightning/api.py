"""The public function of lightning attention: checks, choice of backend, dispatch.

A backend is one file and one entry in ``BACKENDS``. It takes checked arguments and returns the output in the input
dtype with the final state, or None for the state when it was not asked for.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.errors import KernelArgumentError
from mmkernels.lightning.chunked import chunked_lightning_attention
from mmkernels.lightning.naive import naive_lightning_attention
from mmkernels.lightning.validate import check_attention, state_dtype

Backend = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool],
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
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a decay per head, forward and (by autograd) backward.

    ``o_t = sum over j <= t in t's document of exp(-s (t-j)) (q_t . k_j) v_j``, which is ``o_t = q_t S_t`` with
    ``S_t = exp(-s) S_{t-1} + k_t^T v_t`` (MiniMax-01 paper 2.2.2). No scale factor, no softmax, no denominator.

    Args:
        q_BTHD: queries [B, T, H, D], float32, bfloat16, float16 or float64, any strides.
        k_BTHD: keys, likewise.
        v_BTHD: values [B, T, H, E], likewise; E may differ from D.
        slopes_H: decay slopes >= 0, float32 (or float64) [H]. Constants: no gradient. Under tensor parallelism the
            caller passes the slice that belongs to its heads.
        cu_seqlens: int32 or int64 [N+1], offsets of the N documents of one packed row (B must be 1). Documents may
            have any length, 0 included; nothing crosses from one to the next.
        initial_state: state before the first token, float32 [N or B, H, D, E] (float64 for float64 inputs); zeros
            when None. Gradient flows to it.
        output_final_state: also return the state after the last token of each document or batch row. With no
            initial state this is the local state that LASP+ gathers. Gradient flows from it.
        backend: "auto" or a key of ``BACKENDS``: "chunked" or "naive".
        check_values: whether to check the values in ``slopes_H`` and ``cu_seqlens``, not only their shapes. None
            means on CPU tensors only, because reading values from a GPU makes the host wait for it.

    Returns:
        ``(o [B, T, H, E] in the input dtype, final state in the dtype and shape of initial_state, or None)``.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_attention(q_BTHD, k_BTHD, v_BTHD, slopes_H, cu_seqlens, initial_state, check_values)
    run = resolve_backend(backend, q_BTHD.device)
    return run(q_BTHD, k_BTHD, v_BTHD, slopes_H, cu_seqlens, initial_state, output_final_state)


def resolve_backend(name: str, device: torch.device) -> Backend:
    """The function behind a backend name; "auto" takes the fastest one for the device.

    Raises:
        KernelArgumentError: the name is unknown.
    """
    if name == "auto":
        name = AUTO.get(device.type, "chunked")
    if name not in BACKENDS:
        raise KernelArgumentError("backend", repr(name), ", ".join(["auto", *BACKENDS]))
    return BACKENDS[name]


def _naive(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The float64 recurrence, cast back to what the public function promises."""
    o_BTHE, final = naive_lightning_attention(q_BTHD, k_BTHD, v_BTHE, slopes_H, cu_seqlens, initial_state)
    return o_BTHE.to(q_BTHD.dtype), final.to(state_dtype(q_BTHD.dtype)) if output_final_state else None


BACKENDS: dict[str, Backend] = {"chunked": chunked_lightning_attention, "naive": _naive}
AUTO: dict[str, str] = {"cpu": "chunked"}

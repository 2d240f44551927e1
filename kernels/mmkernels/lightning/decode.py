"""One token of lightning attention: the step of a decode loop.

Shape letters: B sequences, H heads, D width of q and k, E width of v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning.checks import check_decode

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_WIDTH = 256


def lightning_decode_step(
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BHE: Tensor,
    slopes_H: Tensor,
    state_BHDE: Tensor,
    *,
    inplace: bool = False,
    slots_B: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Take the state one token further and read the output from it (MiniMax-01 paper 2.2.2).

    Args:
        q_BHD: query of each sequence's new token, any floating dtype, any strides.
        k_BHD: key of each new token.
        v_BHE: value of each new token.
        slopes_H: decay slope of each head, float32 (or float64).
        state_BHDE: state after the previous token, float32 (float64 for float64 inputs).
        inplace: write the new state over ``state_BHDE``; without it, that tensor is not written to.
        slots_B: int64, the place of each sequence's state among those of ``state_BHDE``, which may hold more than B; no
            two alike. A negative one stands for no sequence: it has no state, and its output is 0. With ``inplace``.
        silu: take the SiLU of q, k and v first, rounded to their dtype (MiniMax-01 Fig. 3).
        backend: "triton" (one pass over the state, no gradient), "torch", or "auto": Triton on CUDA for D and E up to
            256 when no gradient is asked for and the inputs are not float64, else torch.

    Returns:
        ``(o_BHE, new_state_BHDE)``: the output in the input dtype and the state in the state's dtype; with ``inplace``
        the tensor that was passed in.

    Raises:
        KernelArgumentError: a dtype, shape or device that does not fit.
    """
    check_decode(q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE, slots_B)
    tensors = (q_BHD, k_BHD, v_BHE, state_BHDE)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if inplace:
        _check_inplace(state_BHDE, differentiable)
    elif slots_B is not None:
        raise KernelArgumentError("slots_B", f"shape {list(slots_B.shape)}", "None without inplace")
    if _use_triton(backend, q_BHD, v_BHE, differentiable):
        from mmkernels.lightning.triton.decode_kernel import triton_decode_step  # only this path needs Triton

        new_BHDE = state_BHDE if inplace else torch.empty_like(state_BHDE, memory_format=torch.contiguous_format)
        return triton_decode_step(q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE, new_BHDE, slots_B, silu), new_BHDE
    if silu:
        q_BHD, k_BHD, v_BHE = (F.silu(x) for x in (q_BHD, k_BHD, v_BHE))
    if slots_B is not None:
        return _torch_step_of_slots(q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE, slots_B), state_BHDE
    return _torch_decode_step(q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE, inplace)


def _torch_decode_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, state_BHDE: Tensor, inplace: bool
) -> tuple[Tensor, Tensor]:
    # Under autocast the product would run in bfloat16 and lose the state's precision.
    with torch.autocast(q_BHD.device.type, enabled=False):
        acc = state_BHDE.dtype
        decay_H11 = torch.exp(-slopes_H.detach().to(acc))[:, None, None]
        outer = k_BHD.to(acc).unsqueeze(-1) * v_BHE.to(acc).unsqueeze(-2)
        new_BHDE = torch.addcmul(outer, state_BHDE, decay_H11, out=state_BHDE if inplace else None)
        o_BHE = torch.matmul(q_BHD.to(acc).unsqueeze(-2), new_BHDE).squeeze(-2)
    return o_BHE.to(q_BHD.dtype), new_BHDE


def _torch_step_of_slots(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, states_SHDE: Tensor, slots_B: Tensor
) -> Tensor:
    o_BHE = v_BHE.new_zeros(v_BHE.shape)
    real = torch.nonzero(slots_B >= 0)[:, 0]
    slots = slots_B[real]
    state = states_SHDE.index_select(0, slots)
    o_BHE[real], state = _torch_decode_step(q_BHD[real], k_BHD[real], v_BHE[real], slopes_H, state, True)
    states_SHDE.index_copy_(0, slots, state)
    return o_BHE


def _check_inplace(state_BHDE: Tensor, differentiable: bool) -> None:
    if differentiable:
        raise KernelArgumentError("inplace", True, "False when a gradient is asked for")
    if any(size > 1 and stride == 0 for size, stride in zip(state_BHDE.shape, state_BHDE.stride(), strict=True)):
        raise KernelArgumentError("state_BHDE", f"strides {list(state_BHDE.stride())}", "none of them 0, with inplace")


def _use_triton(backend: str, q_BHD: Tensor, v_BHE: Tensor, differentiable: bool) -> bool:
    """Whether the call runs on Triton; "auto" takes it for what it can run on a CUDA device.

    Raises:
        KernelArgumentError: the name is unknown, or Triton was asked for and cannot run this call.
    """
    if backend not in BACKENDS:
        raise KernelArgumentError("backend", repr(backend), ", ".join(BACKENDS))
    widths = [q_BHD.shape[-1], v_BHE.shape[-1]]
    good_dtype, good_widths = q_BHD.dtype in TRITON_DTYPES, all(0 < width <= TRITON_MAX_WIDTH for width in widths)
    if backend != "triton":
        return backend == "auto" and q_BHD.is_cuda and good_dtype and good_widths and not differentiable
    from mmkernels.common.triton_support import check_device  # only this path needs Triton

    check_device("q_BHD", q_BHD)
    if not good_dtype:
        raise KernelArgumentError("q_BHD", f"dtype {q_BHD.dtype}", "float32, bfloat16 or float16 with backend='triton'")
    if not good_widths:
        raise KernelArgumentError("state_BHDE", f"D, E = {widths}", f"1 to {TRITON_MAX_WIDTH} with backend='triton'")
    if differentiable:
        raise KernelArgumentError("backend", repr(backend), "'torch' or 'auto' when a gradient is asked for")
    return True

"""One token of lightning attention: the step of a decode loop.

Shape letters: B sequences, H heads, D width of q and k, E width of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.lightning.validate import check_decode


def lightning_decode_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, state_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """Take the state one token further and read the output from it (MiniMax-01 paper 2.2.2).

    Args:
        q_BHD: query of each sequence's new token, any floating dtype.
        k_BHD: its key.
        v_BHE: its value.
        slopes_H: decay slope of each head, float32 (or float64).
        state_BHDE: state after the previous token, float32 (float64 for float64 inputs). It is not written to.

    Returns:
        ``(o_BHE, new_state_BHDE)``: the output in the input dtype and the state in the state's dtype.

    Raises:
        KernelArgumentError: a dtype, shape or device that does not fit.
    """
    check_decode(q_BHD, k_BHD, v_BHE, slopes_H, state_BHDE)
    # Under autocast the product would run in bfloat16 and lose the state's precision.
    with torch.autocast(q_BHD.device.type, enabled=False):
        acc = state_BHDE.dtype
        decay_H11 = torch.exp(-slopes_H.detach().to(acc))[:, None, None]
        outer = k_BHD.to(acc).unsqueeze(-1) * v_BHE.to(acc).unsqueeze(-2)
        new_BHDE = torch.addcmul(outer, state_BHDE, decay_H11)
        o_BHE = torch.matmul(q_BHD.to(acc).unsqueeze(-2), new_BHDE).squeeze(-2)
    return o_BHE.to(q_BHD.dtype), new_BHDE

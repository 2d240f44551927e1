"""The experts, and the way tokens get to them and back: the one place where a layer of experts meets other devices.

:class:`MoE` holds an :class:`ExpertCall`; expert parallelism replaces it by one with all-to-alls.

Legend: T tokens, D model width, F expert width, E experts, K experts a token, N assignments kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.model.ffn import swiglu
from mmtrain.model.router import Routing


class Experts(nn.Module):
    """E SwiGLU experts, stacked; FFN_i(x) = W2_i (SiLU(W1_i x) * W3_i x)."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w13_E2FD = nn.Parameter(torch.empty(num_experts, 2, ffn_hidden_size, hidden_size))
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        """Run rows sorted by expert, `count_E` of them each; [N, D] to [N, D]."""
        offsets_E = count_E.cumsum(0).to(torch.int32)
        gate_up_N2F = F.grouped_mm(x_ND, self.w13_E2FD.flatten(1, 2).transpose(1, 2), offs=offsets_E)
        return F.grouped_mm(swiglu(gate_up_N2F), self.w2_EDF.transpose(1, 2), offs=offsets_E)


class ExpertCall(Protocol):
    """What an MoE layer asks for."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum over each token's kept experts, [T, D]."""


class LocalExperts:
    """All experts on this device: gather rows, multiply, add up."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        """See :class:`ExpertCall`."""
        x_ND = permute(x_TD, routing)
        return unpermute(experts(x_ND, routing.count_E), routing)


def permute(x_TD: Tensor, routing: Routing) -> Tensor:
    """Copy each token's row to its kept assignments, sorted by expert; [T, D] to [N, D]."""
    return _Permute.apply(x_TD, routing.token_N, routing.slot_TK)


def unpermute(y_ND: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of each token's kept rows; [N, D] to [T, D]."""
    return _Unpermute.apply(y_ND, routing.weight_TK, routing.token_N, routing.slot_TK)


def _gather_slots(y_ND: Tensor, slot_TK: Tensor) -> Tensor:
    """Rows of y for each assignment, zeros for the dropped ones; [T, K, D]."""
    padded = torch.cat([y_ND, y_ND.new_zeros(1, y_ND.shape[1])])
    return padded[slot_TK]


class _Permute(torch.autograd.Function):
    """Gathers both ways: backward reads each token's slots, so no atomic or serial scatter-add is needed."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, token_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _gather_slots(dy_ND, slot_TK).sum(1), None, None


class _Unpermute(torch.autograd.Function):
    """The transpose of :class:`_Permute`, with weights and their gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, y_ND: Tensor, weight_TK: Tensor, token_N: Tensor, slot_TK: Tensor) -> Tensor:
        y_TKD = _gather_slots(y_ND, slot_TK)
        ctx.save_for_backward(y_TKD, weight_TK, token_N, slot_TK)
        return torch.einsum("tkd,tk->td", y_TKD, weight_TK.to(y_TKD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_TKD, weight_TK, token_N, slot_TK = ctx.saved_tensors
        dweight_TK = torch.einsum("tkd,td->tk", y_TKD, do_TD).to(weight_TK.dtype)
        weight_N = weight_TK.new_empty(token_N.numel() + 1)
        weight_N[slot_TK.flatten()] = weight_TK.flatten()
        dy_ND = do_TD.index_select(0, token_N).mul_(weight_N[:-1, None].to(do_TD.dtype))
        return dy_ND, dweight_TK, None, None

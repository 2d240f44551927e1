"""Groups of experts one after another, each multiplied while rows of others travel, forward and backward.

Rows of all groups are sent off at once, in order; the results of a group travel back while the next is multiplied. In
backward, gradients of rows are sent back before those of a group's weights are computed, which hides their way too.

Legend: N tokens, K experts a token, R rows to send and to get back, D model width, F expert width (of this rank's
slice), L experts of this rank, S rows of a group sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.grouped_mlp import grouped_mlp_forward, grouped_mlp_input_grad, grouped_weight_grad
from mmkernels.moe import Arrivals, Route, permute, permute_grad, unpermute, unpermute_grads
from mmtrain.parallel.expert.dispatcher import Travel
from mmtrain.parallel.expert.token_groups import Group


@dataclass(frozen=True)
class Job:
    """What one call of a layer's experts has to do.

    Attributes:
        sortings: of each group; asked for when the rows are on their way.
        parts: of each expert that count as one in a group, which has a single one if there are several.
    """

    groups: list[Group]
    sortings: Callable[[], list[Arrivals]]
    travel: Travel
    parts: int = 1

    def experts(self, group: Group) -> slice:
        """Those of the rank's experts that the group's are, or are parts of."""
        return slice(group.experts.start // self.parts, -(-group.experts.stop // self.parts))


def run_groups(x_ND: Tensor, sent: Route, w13_L2FD: Tensor, w2_LDF: Tensor, job: Job) -> Tensor:
    """Sum of the outputs of each token's experts, [N, D], weighted as `sent` says.

    Differentiable in the tokens, the route's weights and those of the experts. Tokens go in and come out, not rows: no
    gradient of rows is seen outside, which may lie in memory that the next exchange takes.
    """
    weight_NK, sent = sent.weight_TK, sent._replace(weight_TK=sent.weight_TK.detach())  # else its graph lives on
    return _Groups.apply(x_ND, weight_NK, w13_L2FD, w2_LDF, sent, job)


class _Groups(torch.autograd.Function):
    """Saves the sorted rows, the first product and the experts' outputs; the activation is computed again.

    Rows that no group names, and empty places, may hold anything.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_ND: Tensor, weight_NK: Tensor, w13_L2FD: Tensor, w2_LDF: Tensor, sent: Route, job: Job
    ) -> Tensor:
        travel, rows = job.travel, (sent.token_R.shape[0], x_ND.shape[1])
        x_RD = permute(x_ND, sent, clear=False, out=travel.memory(*rows, x_ND.dtype))
        arrivals = [travel.out(group, x_RD) for group in job.groups]
        sortings, y_RD = job.sortings(), torch.empty_like(x_RD)
        saved, homes = [], []
        for group, sorting, arriving in zip(job.groups, sortings, arrivals, strict=True):
            x_SD, experts = travel.sorted(arriving, sorting), job.experts(group)
            y_SD, gate_up_S2F = grouped_mlp_forward(x_SD, w13_L2FD[experts], w2_LDF[experts], sorting.offset_L)
            homes.append(travel.home(group, y_SD, sorting, y_RD))
            saved += [x_SD, gate_up_S2F]
        travel.wait(homes)
        ctx.save_for_backward(w13_L2FD, w2_LDF, y_RD, weight_NK, *saved)
        ctx.job, ctx.sortings, ctx.sent = job, sortings, sent
        return unpermute(y_RD, weight_NK, sent, clear=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_ND: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        job, travel, sent = ctx.job, ctx.job.travel, ctx.sent
        w13_L2FD, w2_LDF, y_RD, weight_NK, *saved = ctx.saved_tensors
        dy_RD, dweight_NK = unpermute_grads(
            do_ND, y_RD, weight_NK, sent, clear=False, out=travel.memory(*y_RD.shape, y_RD.dtype)
        )
        arrivals = [travel.out(group, dy_RD) for group in job.groups]
        dx_RD, homes = torch.empty_like(dy_RD), []
        dw13 = _Gradient(w13_L2FD, ctx.needs_input_grad[2])
        dw2 = _Gradient(w2_LDF, ctx.needs_input_grad[3])
        rows = zip(saved[::2], saved[1::2], strict=True)
        for group, sorting, arriving, (x_SD, gate_up_S2F) in zip(job.groups, ctx.sortings, arrivals, rows, strict=True):
            offset_L, dy_SD, experts = sorting.offset_L, travel.sorted(arriving, sorting), job.experts(group)
            dx_SD, dgate_up_S2F, hidden_SF = grouped_mlp_input_grad(
                dy_SD, gate_up_S2F, w13_L2FD[experts], w2_LDF[experts], offset_L
            )
            homes.append(travel.home(group, dx_SD, sorting, dx_RD))
            dw2.add(experts, dy_SD, hidden_SF, offset_L)
            dw13.add(experts, dgate_up_S2F, x_SD, offset_L)
        travel.wait(homes)
        return permute_grad(dx_RD, sent), dweight_NK, dw13.whole, dw2.whole, None, None


class _Gradient:
    """A weight's gradient, put together from those of the groups' experts."""

    def __init__(self, weight: Tensor, wanted: bool) -> None:
        self.weight, self.wanted = weight, wanted
        self.whole: Tensor | None = None
        self._begun = 0

    def add(self, experts: slice, dout_SN: Tensor, in_SM: Tensor, offset_L: Tensor) -> None:
        """Compute that of some experts, of their rows' outputs' gradients and inputs."""
        if not self.wanted:
            return
        part = grouped_weight_grad(dout_SN, in_SM, offset_L).view(-1, *self.weight.shape[1:])
        if self.whole is None:
            self.whole = part if part.shape == self.weight.shape else torch.empty_like(self.weight)
        if experts.stop <= self._begun:  # another part of the last one's tokens
            self.whole[experts] += part
        elif part is not self.whole:
            self.whole[experts] = part
        self._begun = experts.stop

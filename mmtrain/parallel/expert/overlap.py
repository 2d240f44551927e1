"""Token groups one after another, each multiplied while rows of others travel, forward and backward.

Rows of all groups are sent off at once, in order; the results of a group travel back while the next is multiplied. In
backward, gradients of rows are sent back before those of a group's weights are computed, which hides their way too.

Legend: N tokens, K experts a token, R rows to send and to get back, D model width, F expert width (of this rank's
slice), L experts of this rank, S received rows of a group sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.grouped_mlp import grouped_mlp_forward, grouped_mlp_input_grad, grouped_weight_grad
from mmkernels.moe import ReceivedRows, Route, permute, permute_grad, unpermute, unpermute_grads
from mmtrain.model.moe.expert_chunks import backward_in_chunks, forward_in_chunks
from mmtrain.parallel.expert.dispatcher import TokenDispatcher
from mmtrain.parallel.expert.token_groups import TokenGroup


@dataclass(frozen=True)
class GroupSchedule:
    """Order of work of one call of a layer's experts.

    Attributes:
        groups: in the order in which they are sent, multiplied and sent back.
        receive: gives the order of each group's received rows; called when the rows are on their way.
        dispatcher: by which rows travel.
        chunks: of each expert that count as one in a group, which has a single one if there are several.
        chunk_rows: rows of a group that are multiplied at once, of which nothing but the input waits for backward;
            None: all.
    """

    groups: list[TokenGroup]
    receive: Callable[[], list[ReceivedRows]]
    dispatcher: TokenDispatcher
    chunks: int = 1
    chunk_rows: int | None = None

    def experts(self, group: TokenGroup) -> slice:
        """Range of the rank's experts that the group has, or has chunks of."""
        return slice(group.experts.start // self.chunks, -(-group.experts.stop // self.chunks))


def run_token_groups(x_ND: Tensor, sent: Route, w13_L2FD: Tensor, w2_LDF: Tensor, schedule: GroupSchedule) -> Tensor:
    """Sum of the outputs of each token's experts, [N, D], weighted as `sent` says.

    Differentiable in the tokens, the route's weights and those of the experts. Tokens go in and come out, not rows: no
    gradient of rows is seen outside, which may lie in memory that the next exchange takes.

    Args:
        x_ND: tokens.
        sent: where their rows lie in the sender's buffer.
        w13_L2FD: first weights of this rank's experts.
        w2_LDF: second weights of this rank's experts.
        schedule: the groups, and the way of their rows.
    """
    weight_NK, sent = sent.weight_TK, sent._replace(weight_TK=sent.weight_TK.detach())  # else its graph lives on
    return _OverlappedExperts.apply(x_ND, weight_NK, w13_L2FD, w2_LDF, sent, schedule)


class _OverlappedExperts(torch.autograd.Function):
    """Saves the sorted rows, the first product and the experts' outputs; the activation is computed again.

    In chunks of rows the first product is computed again too, and the gradients of the weights come with those of the
    rows, of which all chunks' are sent back then: other groups' products hide their way, but not their own.

    Rows that no group names, and empty slots, may hold anything.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_ND: Tensor,
        weight_NK: Tensor,
        w13_L2FD: Tensor,
        w2_LDF: Tensor,
        sent: Route,
        schedule: GroupSchedule,
    ) -> Tensor:
        dispatcher, rows = schedule.dispatcher, (sent.token_R.shape[0], x_ND.shape[1])
        x_RD = permute(x_ND, sent, clear=False, out=dispatcher.send_buffer(*rows, x_ND.dtype))
        in_flight = [dispatcher.dispatch(group, x_RD) for group in schedule.groups]
        all_received, y_RD = schedule.receive(), torch.empty_like(x_RD)
        saved, combined = [], []
        for group, received, arriving in zip(schedule.groups, all_received, in_flight, strict=True):
            x_SD, experts = dispatcher.permute(arriving, received), schedule.experts(group)
            weights = w13_L2FD[experts], w2_LDF[experts], received.offset_L
            if schedule.chunk_rows is None:
                y_SD, gate_up_S2F = grouped_mlp_forward(x_SD, *weights)
            else:
                y_SD, gate_up_S2F = forward_in_chunks(x_SD, *weights, schedule.chunk_rows), None
            combined.append(dispatcher.combine(group, y_SD, received, y_RD))
            saved += [x_SD, gate_up_S2F]
        dispatcher.wait(combined)
        ctx.save_for_backward(w13_L2FD, w2_LDF, y_RD, weight_NK, *saved)
        ctx.schedule, ctx.all_received, ctx.sent = schedule, all_received, sent
        return unpermute(y_RD, weight_NK, sent, clear=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_ND: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        schedule, dispatcher, sent = ctx.schedule, ctx.schedule.dispatcher, ctx.sent
        w13_L2FD, w2_LDF, y_RD, weight_NK, *saved = ctx.saved_tensors
        dy_RD, dweight_NK = unpermute_grads(
            do_ND, y_RD, weight_NK, sent, clear=False, out=dispatcher.send_buffer(*y_RD.shape, y_RD.dtype)
        )
        in_flight = [dispatcher.dispatch(group, dy_RD) for group in schedule.groups]
        dx_RD, combined = torch.empty_like(dy_RD), []
        dw13 = _Gradient(w13_L2FD, ctx.needs_input_grad[2])
        dw2 = _Gradient(w2_LDF, ctx.needs_input_grad[3])
        rows = zip(saved[::2], saved[1::2], strict=True)
        for group, received, arriving, (x_SD, gate_up_S2F) in zip(
            schedule.groups, ctx.all_received, in_flight, rows, strict=True
        ):
            offset_L, experts = received.offset_L, schedule.experts(group)
            dy_SD, weights = dispatcher.permute(arriving, received), (w13_L2FD[experts], w2_LDF[experts], offset_L)
            if schedule.chunk_rows is not None:
                dx_SD, dw13_part, dw2_part = backward_in_chunks(
                    dy_SD, x_SD, *weights, schedule.chunk_rows, dw13.wanted or dw2.wanted
                )
                combined.append(dispatcher.combine(group, dx_SD, received, dx_RD))
                dw2.add(experts, dw2_part)
                dw13.add(experts, dw13_part)
                continue
            dx_SD, dgate_up_S2F, hidden_SF = grouped_mlp_input_grad(dy_SD, gate_up_S2F, *weights)
            combined.append(dispatcher.combine(group, dx_SD, received, dx_RD))
            if dw2.wanted:
                dw2.add(experts, grouped_weight_grad(dy_SD, hidden_SF, offset_L))
            if dw13.wanted:
                dw13.add(experts, grouped_weight_grad(dgate_up_S2F, x_SD, offset_L))
        dispatcher.wait(combined)
        return permute_grad(dx_RD, sent), dweight_NK, dw13.whole, dw2.whole, None, None


class _Gradient:
    """A weight's gradient, put together group by group."""

    def __init__(self, weight: Tensor, wanted: bool) -> None:
        self.weight, self.wanted = weight, wanted
        self.whole: Tensor | None = None
        self._begun = 0

    def add(self, experts: slice, part: Tensor | None) -> None:
        """Add the gradient of the weights of some experts; None, or any that is not wanted, is left out.

        Args:
            experts: range of the rank's experts, after that of the call before, or the last one of it again.
            part: their gradient, of any shape; nobody else writes to it.
        """
        if part is None or not self.wanted:
            return
        part = part.view(-1, *self.weight.shape[1:])
        if self.whole is None:
            self.whole = part if part.shape == self.weight.shape else torch.empty_like(self.weight)
        if experts.stop <= self._begun:  # another chunk of the last one's tokens
            self.whole[experts] += part
        elif part is not self.whole:
            self.whole[experts] = part
        self._begun = experts.stop

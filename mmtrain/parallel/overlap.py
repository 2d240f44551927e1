"""Groups of experts one after another, each multiplied while rows of others travel, forward and backward.

Rows of all groups are sent off at once, in order; the results of a group travel back while the next is multiplied. In
backward, gradients of rows are sent back before those of a group's weights are computed, which hides their way too.

Legend: R rows to send and to get back, D model width, F expert width (of this rank's slice), L experts of this rank,
S rows of a group sorted by expert, W ranks along ep, P ranks along etp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmkernels.moe import Arrivals, take_rows
from mmkernels.swiglu import swiglu, swiglu_grad
from mmtrain.parallel.collectives import exchange_into, gather_into, scatter_sum_into
from mmtrain.parallel.groups import Group
from mmtrain.parallel.lanes import Lanes, Pending


@dataclass(frozen=True)
class Travel:
    """The way of a group's rows to the ranks that have its experts, and back.

    Out: all-to-all over ep, all-gather over etp. Home: reduce-scatter over etp, all-to-all over ep. As each is the
    other's transpose, gradients take the same two ways.

    Attributes:
        etp: None if rows do not travel along it.
    """

    ep: ProcessGroup
    etp: ProcessGroup | None
    lanes: Lanes

    def out(self, group: Group, x_RD: Tensor) -> tuple[Tensor, Pending]:
        """Send a group's rows off; returns the P * padded rows that will have arrived."""
        arrived = x_RD.new_empty(group.padded, x_RD.shape[1])
        exchange = partial(
            exchange_into, arrived[: group.arriving], x_RD[group.rows], group.receive, group.send, self.ep
        )
        pending = self.lanes.run("ep", exchange)
        if self.etp is None:
            return arrived, pending
        gathered = x_RD.new_empty(self.etp.size() * group.padded, x_RD.shape[1])
        return gathered, self.lanes.run("etp", partial(gather_into, gathered, arrived, self.etp), pending)

    def home(self, group: Group, rows_MD: Tensor, into_RD: Tensor) -> Pending:
        """Send P * padded rows back to where they came from, into the group's rows of `into`."""
        pending, arrived = None, rows_MD
        if self.etp is not None:
            arrived = rows_MD.new_empty(group.padded, rows_MD.shape[1])
            pending = self.lanes.run("etp", partial(scatter_sum_into, arrived, rows_MD, self.etp))
        into = into_RD[group.rows]
        back = partial(exchange_into, into, arrived[: group.arriving], group.send, group.receive, self.ep)
        return self.lanes.run("ep", back, pending)


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


def run_groups(x_RD: Tensor, w13_L2FD: Tensor, w2_LDF: Tensor, job: Job) -> Tensor:
    """Each row's expert's output, [R, D], where its row was; differentiable in the rows and the weights.

    Rows that no group names, and empty places, may hold anything, here and in gradients.
    """
    return _Groups.apply(x_RD, w13_L2FD, w2_LDF, job)


class _Groups(torch.autograd.Function):
    """Saves the sorted rows and the first product; the activation is computed again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_RD: Tensor, w13_L2FD: Tensor, w2_LDF: Tensor, job: Job) -> Tensor:
        travel, lanes = job.travel, job.travel.lanes
        arrivals = [travel.out(group, x_RD) for group in job.groups]
        sortings, y_RD = job.sortings(), torch.empty_like(x_RD)
        saved, homes = [], []
        for group, sorting, (rows_MD, pending) in zip(job.groups, sortings, arrivals, strict=True):
            lanes.wait(pending)
            x_SD, w2 = _move(rows_MD, sorting.source_M), w2_LDF[job.experts(group)]
            w13 = w13_L2FD[job.experts(group)].flatten(1, 2)
            gate_up_S2F = F.grouped_mm(x_SD, w13.transpose(1, 2), offs=sorting.offset_L)
            hidden_SF = swiglu(gate_up_S2F, sorting.offset_L[-1:])
            y_SD = F.grouped_mm(hidden_SF, w2.transpose(1, 2), offs=sorting.offset_L)
            homes.append(travel.home(group, _move(y_SD, sorting.place_M), y_RD))
            saved += [x_SD, gate_up_S2F]
        for pending in homes:
            lanes.wait(pending)
        ctx.save_for_backward(w13_L2FD, w2_LDF, *saved)
        ctx.job, ctx.sortings = job, sortings
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        job, travel, lanes = ctx.job, ctx.job.travel, ctx.job.travel.lanes
        w13_L2FD, w2_LDF, *saved = ctx.saved_tensors
        dy_RD = dy_RD.contiguous()
        arrivals = [travel.out(group, dy_RD) for group in job.groups]
        dx_RD, homes = torch.empty_like(dy_RD), []
        dw13 = _Gradient(w13_L2FD, ctx.needs_input_grad[1])
        dw2 = _Gradient(w2_LDF, ctx.needs_input_grad[2])
        rows = zip(saved[::2], saved[1::2], strict=True)
        for group, sorting, (rows_MD, pending), (x_SD, gate_up_S2F) in zip(
            job.groups, ctx.sortings, arrivals, rows, strict=True
        ):
            lanes.wait(pending)
            offset_L, dy_SD, experts = sorting.offset_L, _move(rows_MD, sorting.source_M), job.experts(group)
            dhidden_SF = F.grouped_mm(dy_SD, w2_LDF[experts], offs=offset_L)
            dgate_up_S2F, hidden_SF = swiglu_grad(gate_up_S2F, dhidden_SF, offset_L[-1:])
            dx_SD = F.grouped_mm(dgate_up_S2F, w13_L2FD[experts].flatten(1, 2), offs=offset_L)
            homes.append(travel.home(group, _move(dx_SD, sorting.place_M), dx_RD))
            dw2.add(experts, dy_SD, hidden_SF, offset_L)
            dw13.add(experts, dgate_up_S2F, x_SD, offset_L)
        for pending in homes:
            lanes.wait(pending)
        return dx_RD, dw13.whole, dw2.whole, None


def _move(x_ND: Tensor, index_M: Tensor) -> Tensor:
    """Rows in another order; what nobody reads stays unwritten."""
    return take_rows(x_ND, index_M, clear=False)


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
        part = F.grouped_mm(dout_SN.t(), in_SM, offs=offset_L).view(-1, *self.weight.shape[1:])
        if self.whole is None:
            self.whole = part if part.shape == self.weight.shape else torch.empty_like(self.weight)
        if experts.stop <= self._begun:  # another part of the last one's tokens
            self.whole[experts] += part
        elif part is not self.whole:
            self.whole[experts] = part
        self._begun = experts.stop

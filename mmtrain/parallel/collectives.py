"""Collectives that autograd goes through, on plain tensors, over gloo or NCCL; in a group of one they do nothing.

All work along dim 0, whatever dimensions follow, and in the order of the ranks in the group. Every rank of the group
has to call them, and to run their backward, in the same order.

Legend: W ranks of the group, N rows of one rank, M = N W, R rows that a rank receives, D all further dimensions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

# torch 2.13 renamed them, and warns where it meets the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(x_ND: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' rows, [N W, D], where each rank goes on to compute something of its own with them.

    Backward sums the ranks' gradients of the rows of this rank: a reduce-scatter.

    Args:
        x_ND: any dtype; the same shape on every rank. N may be 0.
        group: the ranks.
    """
    return x_ND if group.size() == 1 else _GatherRows.apply(x_ND, group)


def scatter_sum_rows(x_MD: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part [M / W, D] of the sum over the ranks: a reduce-scatter. Backward gathers the gradients' rows.

    Args:
        x_MD: any dtype, in which it is summed; the same shape on every rank.
        group: the ranks.

    Raises:
        ValueError: W does not divide M.
    """
    return x_MD if group.size() == 1 else _ScatterSumRows.apply(x_MD, group)


def gather_alike(x_ND: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' rows, [N W, D], where every rank goes on to compute the same with them.

    Then every rank holds the whole gradient already, and backward takes this rank's rows of it without communication.
    Where ranks compute different things from the rows, the gradient would be wrong: use `gather_rows`.

    Args:
        x_ND: any dtype; the same shape on every rank. N may be 0.
        group: the ranks.
    """
    return x_ND if group.size() == 1 else _GatherAlike.apply(x_ND, group)


def sum_in_place(x: Tensor, group: ProcessGroup) -> Tensor:
    """Replace x, of any shape and dtype, by its sum over the ranks, unseen by autograd, and return it."""
    if group.size() > 1:
        dense = x.detach().contiguous()
        dist.all_reduce(dense, group=group)
        if dense.data_ptr() != x.data_ptr():
            x.detach().copy_(dense)
    return x


def sum_alike(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks of parts, of any shape, where every rank goes on to compute the same with it.

    Then every rank has the gradient of its own part already, and backward hands it on without communication.
    """
    return x if group.size() == 1 else _SumAlike.apply(x, group)


def sum_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """Identity on x, which every rank holds alike and uses in its own way: backward sums the ranks' gradients."""
    return x if group.size() == 1 else _SumGradient.apply(x, group)


def exchange_into(
    out_RD: Tensor, x_ND: Tensor, receive: list[int] | None, send: list[int] | None, group: ProcessGroup
) -> None:
    """An all-to-all of rows into memory that is there, unseen by autograd; in a group of one a copy.

    Called for no rows too: a rank that neither sends nor receives does not know whether the others do.
    """
    if group.size() == 1:
        out_RD.copy_(x_ND)
    else:
        dist.all_to_all_single(out_RD, x_ND, receive, send, group=group)


def exchange_rows(x_ND: Tensor, receive: list[int], send: list[int], group: ProcessGroup) -> Tensor:
    """An all-to-all of rows, [R, D], in the order of the ranks; backward brings the rows' gradients back.

    Every rank takes part in both directions, one without rows too, so its `x` must want a gradient if the others' do,
    and what it gets must be part of what is differentiated.

    Args:
        x_ND: any dtype; the rows for rank 0, then those for rank 1, and so on.
        receive: number of rows from every rank.
        send: number of rows to every rank.
        group: the ranks.
    """
    return x_ND if group.size() == 1 else _ExchangeRows.apply(x_ND, receive, send, group)


def gather_into(out_MD: Tensor, x_ND: Tensor, group: ProcessGroup) -> None:
    """An all-gather of as many rows of each rank into memory that is there, unseen by autograd."""
    if out_MD.numel():  # alike on all ranks
        _all_gather(out_MD, x_ND, group=group)


def start_gather_into(out_MD: Tensor, x_ND: Tensor, group: ProcessGroup) -> dist.Work:
    """Start an all-gather of as many rows of each rank into memory that is there, unseen by autograd."""
    return _all_gather(out_MD, x_ND, group=group, async_op=True)


def start_scatter_sum_into(out_ND: Tensor, x_MD: Tensor, group: ProcessGroup) -> dist.Work:
    """Start a reduce-scatter of rows into memory that is there, unseen by autograd."""
    return _reduce_scatter(out_ND, x_MD, group=group, async_op=True)


def scatter_sum_into(out_ND: Tensor, x_MD: Tensor, group: ProcessGroup) -> None:
    """A reduce-scatter of rows into memory that is there, unseen by autograd."""
    if out_ND.numel():
        _reduce_scatter(out_ND, x_MD, group=group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND: Tensor, receive: list[int], send: list[int], group: ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _exchange(x_ND, receive, send, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_RD, ctx.send, ctx.receive, ctx.group), None, None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return sum_in_place(grad.contiguous().clone(), ctx.group), None


class _SumAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_in_place(x.contiguous().clone(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_ND, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grad_MD, ctx.group), None


class _ScatterSumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_MD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_sum(x_MD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_ND, ctx.group), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND: Tensor, group: ProcessGroup) -> Tensor:
        ctx.start, ctx.rows = group.rank() * x_ND.shape[0], x_ND.shape[0]
        return _gather(x_ND, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None]:
        return grad_MD.narrow(0, ctx.start, ctx.rows), None


def _gather(x_ND: Tensor, group: ProcessGroup) -> Tensor:
    out_MD = x_ND.new_empty(x_ND.shape[0] * group.size(), *x_ND.shape[1:])
    gather_into(out_MD, x_ND.contiguous(), group)
    return out_MD


def _exchange(x_ND: Tensor, receive: list[int], send: list[int], group: ProcessGroup) -> Tensor:
    out_RD = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
    exchange_into(out_RD, x_ND.contiguous(), receive, send, group)
    return out_RD


def _scatter_sum(x_MD: Tensor, group: ProcessGroup) -> Tensor:
    if x_MD.shape[0] % group.size():
        raise ValueError(f"scatter_sum_rows: {x_MD.shape[0]} rows for {group.size()} ranks")
    out_ND = x_MD.new_empty(x_MD.shape[0] // group.size(), *x_MD.shape[1:])
    scatter_sum_into(out_ND, x_MD.contiguous(), group)
    return out_ND

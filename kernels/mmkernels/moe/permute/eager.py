"""Permute and unpermute in torch, with gathers both ways: the CPU's path.

The definition in `naive.py` is differentiated by autograd, whose scatter-add runs on one CPU thread, 3 times slower.

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.moe.permute.naive import naive_permute, naive_unpermute
from mmkernels.moe.route_types import Route


def eager_permute(x_TD: Tensor, route: Route, out: Tensor | None = None) -> Tensor:
    """Rows [R, D], zeros where unused: `permute` in torch, with arguments that were checked."""
    return _Permute.apply(x_TD, route) if out is None else out.copy_(naive_permute(x_TD.detach(), route))


def eager_permute_grad(dy_RD: Tensor, route: Route) -> Tensor:
    """Sum of each token's rows, [T, D]: `permute_grad` in torch, with arguments that were checked."""
    return naive_unpermute(dy_RD, dy_RD.new_ones(route.row_TK.shape), route)


def eager_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
    """Weighted sum of each token's rows, [T, D]: `unpermute` in torch, with arguments that were checked."""
    return _Unpermute.apply(y_RD, weight_TK, route)


def eager_unpermute_grads(
    do_TD: Tensor, y_RD: Tensor, weight_TK: Tensor, route: Route, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights: `unpermute_grads` in torch, with arguments that were checked.

    Row by row: dy = weight * do of its token, dweight = <y, do of its token>.
    """
    used_R = route.token_R >= 0
    # Every kept assignment has one row: hand it its weight, and the row's product back.
    row_A = torch.where(route.row_TK >= 0, route.row_TK, y_RD.shape[0]).flatten()
    weight_R = weight_TK.new_zeros(y_RD.shape[0] + 1)
    weight_R[row_A] = weight_TK.flatten()
    do_RD = naive_permute(do_TD, route)
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    product_R = torch.where(used_R, torch.einsum("rd,rd->r", y_RD.to(wide), do_RD.to(wide)), 0)
    dweight_TK = torch.cat([product_R, product_R.new_zeros(1)])[row_A].view_as(weight_TK)
    dy_RD = (do_RD.to(wide) * torch.where(used_R, weight_R[:-1], 0)[:, None]).to(y_RD.dtype)
    return dy_RD if out is None else out.copy_(dy_RD), dweight_TK.to(weight_TK.dtype)


def eager_take_rows(x_ND: Tensor, index_M: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows by index, [M, D], zeros where it is -1: `take_rows` in torch, with arguments that were checked."""
    if not x_ND.shape[0]:
        found = x_ND.new_zeros(index_M.shape[0], x_ND.shape[1])
    else:
        found = x_ND.detach().index_select(0, index_M.clamp(min=0)).masked_fill_(index_M[:, None] < 0, 0)
    return found if out is None else out.copy_(found)


class _Permute(torch.autograd.Function):
    """Backward adds up each token's rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, route: Route) -> Tensor:
        ctx.route = route._replace(weight_TK=route.weight_TK.detach())  # else the weights' graph lives on
        return naive_permute(x_TD, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor, None]:
        return eager_permute_grad(dy_RD, ctx.route), None


class _Unpermute(torch.autograd.Function):
    """The transpose of :class:`_Permute`, with weights and their gradient; saves its inputs alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, y_RD: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
        ctx.route = route._replace(weight_TK=route.weight_TK.detach())
        ctx.save_for_backward(y_RD, weight_TK)
        return naive_unpermute(y_RD, weight_TK, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, weight_TK = ctx.saved_tensors
        return *eager_unpermute_grads(do_TD, y_RD, weight_TK, ctx.route), None

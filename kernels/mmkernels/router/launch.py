"""The router's functions through the Triton kernels, with the launch shapes (all tunables are here).

Legend: T and N tokens, D model width, E experts, S splits of the tokens, B blocks of them, F = E + 1.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.router import kernels

# Tiles of the three products, powers of two: what fits in the registers of 4 warps.
BLOCK_T = 64
BLOCK_D = 128
"""For bfloat16; half of it where parts of x go through registers."""
GRAD_BLOCK_T, GRAD_BLOCK_D = 128, 64
"""Of the gradient of x, whose left side always goes through registers."""
MAX_BLOCK_E = 64
WARPS = 4
STAGES = 3
"""Pipeline depth of the products that read x."""
PROGRAMS_PER_SM = 2
"""Programs of the weight's gradient on one multiprocessor."""

# Statistics.
STATS_TILE, STATS_MAX_TOKENS = 4096, 64
"""Logits a program holds, and the most tokens it holds them of."""
STATS_ELEMENTS_PER_THREAD = 16


def triton_router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits, float32 [T, E]: the backend "triton" of `router_logits`, which has checked the arguments."""
    return _RouterLogits.apply(x_TD, weight_ED)


def triton_balance_stats(logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean probabilities [E] and entropy: the backend "triton" of `balance_stats`, which has checked the arguments."""
    return _BalanceStats.apply(logits_NE)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
        ctx.save_for_backward(x_TD, weight_ED)
        (tokens, width), experts = x_TD.shape, weight_ED.shape[0]
        logits_TE = torch.empty(tokens, experts, dtype=torch.float32, device=x_TD.device)
        tile = _tile(x_TD, experts)
        if tokens:
            grid = triton.cdiv(tokens, tile["BLOCK_T"]) * triton.cdiv(experts, tile["BLOCK_E"])
            with torch.cuda.device_of(x_TD):
                kernels.router_logits_kernel[(grid,)](
                    x_TD, weight_ED, logits_TE, tokens, D=width, E=experts, STAGES=STAGES, **tile
                )
        return logits_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dlogits_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        dlogits_TE = dlogits_TE.contiguous()
        with torch.cuda.device_of(x_TD):
            dx_TD = _input_grad(dlogits_TE, weight_ED, x_TD) if ctx.needs_input_grad[0] else None
            dweight_ED = _weight_grad(dlogits_TE, x_TD) if ctx.needs_input_grad[1] else None
        return dx_TD, dweight_ED


def _input_grad(dlogits_TE: Tensor, weight_ED: Tensor, x_TD: Tensor) -> Tensor:
    dx_TD, ((tokens, width), experts) = torch.empty_like(x_TD), (x_TD.shape, weight_ED.shape[0])
    tile = {**_tile(x_TD, experts), "BLOCK_T": GRAD_BLOCK_T, "BLOCK_D": GRAD_BLOCK_D}
    tile["num_warps"] = WARPS if tile["BLOCK_E"] < MAX_BLOCK_E else 2 * WARPS
    if dx_TD.numel():
        grid = triton.cdiv(tokens, tile["BLOCK_T"]) * triton.cdiv(width, tile["BLOCK_D"])
        kernels.router_input_grad_kernel[(grid,)](dlogits_TE, weight_ED, dx_TD, tokens, D=width, E=experts, **tile)
    return dx_TD


def _weight_grad(dlogits_TE: Tensor, x_TD: Tensor) -> Tensor:
    """Splits of the tokens give the device enough programs; one sum in a fixed order follows, without atomics."""
    (tokens, width), experts = x_TD.shape, dlogits_TE.shape[1]
    tile = _tile(x_TD, experts)
    tiles = triton.cdiv(width, tile["BLOCK_D"]) * triton.cdiv(experts, tile["BLOCK_E"])
    blocks = triton.cdiv(tokens, tile["BLOCK_T"])
    splits = max(1, min(blocks, _programs(x_TD) // max(tiles, 1)))
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, max(per_split, 1))
    part_SED = torch.empty(splits, experts, width, dtype=torch.float32, device=x_TD.device)
    if part_SED.numel():
        kernels.router_weight_grad_kernel[(splits * tiles,)](
            dlogits_TE, x_TD, part_SED, tokens, per_split * tile["BLOCK_T"],
            D=width, E=experts, STAGES=STAGES, **tile,
        )  # fmt: skip
    return part_SED.sum(0)


def _tile(x_TD: Tensor, experts: int) -> dict[str, int]:
    block_e = max(16, min(MAX_BLOCK_E, triton.next_power_of_2(experts)))
    block_d = BLOCK_D if x_TD.dtype == torch.bfloat16 else BLOCK_D // 2
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": WARPS}


def _programs(x_TD: Tensor) -> int:
    """Programs that fill the device once. The interpreter gets few, but more than one split."""
    if not x_TD.is_cuda:
        return 6
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(x_TD.device).multi_processor_count


class _BalanceStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = logits_NE.contiguous()
        ctx.save_for_backward(logits_NE)
        tokens, experts = logits_NE.shape
        shape = _stats_shape(experts)
        blocks = triton.cdiv(tokens, shape["BLOCK_N"])
        part_BF = torch.empty(blocks, experts + 1, dtype=torch.float32, device=logits_NE.device)
        if tokens:
            with torch.cuda.device_of(logits_NE):
                kernels.router_balance_kernel[(blocks,)](logits_NE, part_BF, tokens, 1.0 / tokens, E=experts, **shape)
        sums_F = part_BF.sum(0)
        mean_E, entropy = sums_F[:experts], sums_F[experts]
        ctx.mark_non_differentiable(entropy)
        return mean_E, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dmean_E: Tensor, _: Tensor) -> Tensor:
        (logits_NE,) = ctx.saved_tensors
        (tokens, experts), dlogits_NE = logits_NE.shape, torch.empty_like(logits_NE)
        shape = _stats_shape(experts)
        if tokens:
            with torch.cuda.device_of(logits_NE):
                kernels.router_balance_grad_kernel[(triton.cdiv(tokens, shape["BLOCK_N"]),)](
                    logits_NE, dmean_E.contiguous(), dlogits_NE, tokens, 1.0 / tokens, E=experts, **shape
                )
        return dlogits_NE


def _stats_shape(experts: int) -> dict[str, int]:
    padded = triton.next_power_of_2(experts)
    block = max(1, min(STATS_MAX_TOKENS, STATS_TILE // padded))
    warps = max(1, min(8, block * padded // (32 * STATS_ELEMENTS_PER_THREAD)))
    return {"EP": padded, "BLOCK_N": block, "num_warps": warps}

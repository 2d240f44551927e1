"""Routing through the Triton kernels: four launches forward, one backward; nothing waits for the device.

Legend: T tokens, E experts, K experts a token, A = T * K assignments, B token blocks, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.moe.route.kernels import (
    route_choose_kernel,
    route_list_kernel,
    route_scan_kernel,
    route_weight_grad_kernel,
)
from mmkernels.moe.route.kernels_drop import route_drop_kernel
from mmkernels.moe.route_types import Quotas, Route, ranks_by_probability, static_rows

ROUTE_TILE, MIN_TOKENS = 4096, 16
"""Logits that a program of tokens holds, and the fewest tokens it takes."""
LIST_TILE, MIN_LISTED = 8192, 16
"""Pairs (assignment, expert) that a program of the list compares, and the fewest assignments it numbers."""
SCAN_WARPS, LIST_WARPS, DROP_WARPS = 4, 4, 8
ELEMENTS_PER_THREAD, MAX_WARPS = 16, 16
"""Of a tile of logits."""


@dataclass(frozen=True)
class Tiles:
    """The largest blocks of the kernels, powers of two, which trade speed for speed; results do not depend on them.

    Attributes:
        tokens: of a program that chooses experts, or differentiates their weights.
        scanned: token blocks whose counts are summed at a time.
        listed: assignments that a program of the list numbers.
        dropped: entries of an expert's list that a program holds at a time; at most 16384 (counts are packed into 16
            bits).
    """

    tokens: int = 64
    scanned: int = 1024
    listed: int = 256
    dropped: int = 2048

    def route_tokens(self, experts: int) -> int:
        """Tokens of one program of the kernels that hold logits."""
        return max(MIN_TOKENS, min(self.tokens, ROUTE_TILE // triton.next_power_of_2(experts)))

    def list_block(self, experts: int) -> int:
        """Assignments of one program of the list kernel."""
        return max(MIN_LISTED, min(self.listed, LIST_TILE // triton.next_power_of_2(experts)))


TILES = Tiles()


def triton_route(
    logits_TE: Tensor,
    top_k: int,
    capacity: int | None,
    drop_policy: str,
    quotas: Quotas | None = None,
    tiles: Tiles = TILES,
) -> Route:
    """Experts, weights and rows of each token: the backend "triton" of `route`, which has checked the arguments."""
    by_probability = ranks_by_probability(drop_policy)
    return Route(*_Route.apply(logits_TE, top_k, capacity, by_probability, quotas, tiles), capacity)


class _Route(torch.autograd.Function):
    """Integers are constants; the weights' gradient goes to the chosen logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits_TE: Tensor,
        top_k: int,
        capacity: int | None,
        by_probability: bool,
        quotas: Quotas | None,
        tiles: Tiles,
    ) -> tuple[Tensor, ...]:
        weight_TK, expert_TK, *rest = _forward(logits_TE.contiguous(), top_k, capacity, by_probability, quotas, tiles)
        ctx.experts, ctx.tiles = logits_TE.shape[1], tiles
        ctx.save_for_backward(weight_TK, expert_TK)
        ctx.mark_non_differentiable(expert_TK, *rest)
        ctx.set_materialize_grads(False)
        return weight_TK, expert_TK, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dweight_TK: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dweight_TK is None:
            return (None,) * 6
        dlogits_TE = _backward(dweight_TK.contiguous(), *ctx.saved_tensors, ctx.experts, ctx.tiles)
        return dlogits_TE, None, None, None, None, None


def _forward(
    logits_TE: Tensor, top_k: int, capacity: int | None, by_probability: bool, quotas: Quotas | None, tiles: Tiles
) -> tuple[Tensor, ...]:
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    padded = triton.next_power_of_2(experts)
    assignments, block_tokens = tokens * top_k, tiles.route_tokens(experts)
    blocks = triton.cdiv(tokens, block_tokens)
    rows = static_rows(tokens, top_k, experts, capacity)
    limit = max(assignments, 1) if capacity is None else min(capacity, max(assignments, 1))
    ranked = by_probability and (capacity is not None or quotas is not None)

    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    expert_TK, row_TK = (torch.empty(tokens, top_k, dtype=torch.int32, device=device) for _ in range(2))
    token_R = torch.empty(rows, dtype=torch.int32, device=device)
    count_E, assigned_E, offset_E = (torch.empty(experts, dtype=torch.int32, device=device) for _ in range(3))
    # Scratch: bits to rank by, rank in the block; the same sorted by expert, with the assignment's number.
    priority_A, rank_A, list_priority_A, list_assignment_A = torch.empty(
        4, assignments, dtype=torch.int32, device=device
    )
    block_count_EB = torch.empty(experts, blocks, dtype=torch.int32, device=device)

    if tokens:
        route_choose_kernel[(blocks,)](
            logits_TE, weight_TK, expert_TK, priority_A, rank_A, block_count_EB, tokens, blocks,
            E=experts, K=top_k, EP=padded, BLOCK_T=block_tokens, PROBS=ranked,
            num_warps=_warps(padded * block_tokens),
        )  # fmt: skip
    route_scan_kernel[(experts,)](block_count_EB, assigned_E, blocks, BLOCK_B=tiles.scanned, num_warps=SCAN_WARPS)
    if tokens:
        block = tiles.list_block(experts)
        route_list_kernel[(triton.cdiv(assignments, block),)](
            expert_TK, priority_A, rank_A, block_count_EB, assigned_E, list_priority_A, list_assignment_A,
            assignments, blocks, E=experts, EP=padded, ASSIGNMENTS_PER_BLOCK=block_tokens * top_k, BLOCK_A=block,
            num_warps=LIST_WARPS,
        )  # fmt: skip
    quota_E = None if quotas is None else quotas(assigned_E)
    route_drop_kernel[(experts,)](
        list_priority_A, list_assignment_A, assigned_E, row_TK, token_R, count_E, offset_E, rows, limit, quota_E,
        E=experts, K=top_k, EP=padded, PROBS=ranked, QUOTAS=quotas is not None,
        BLOCK=tiles.dropped, num_warps=DROP_WARPS,
    )  # fmt: skip
    return weight_TK, expert_TK, row_TK, token_R, count_E, assigned_E, offset_E


def _backward(dweight_TK: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int, tiles: Tiles) -> Tensor:
    tokens, top_k = weight_TK.shape
    dlogits_TE = torch.empty(tokens, experts, dtype=torch.float32, device=weight_TK.device)
    padded, block_tokens = triton.next_power_of_2(experts), tiles.route_tokens(experts)
    if tokens:
        route_weight_grad_kernel[(triton.cdiv(tokens, block_tokens),)](
            dweight_TK, weight_TK, expert_TK, dlogits_TE, tokens, E=experts, K=top_k,
            EP=padded, KP=triton.next_power_of_2(top_k), BLOCK_T=block_tokens,
            num_warps=_warps(padded * block_tokens),
        )  # fmt: skip
    return dlogits_TE


def _warps(elements: int) -> int:
    """Warps for a program that holds this many logits."""
    return max(1, min(MAX_WARPS, elements // (32 * ELEMENTS_PER_THREAD)))

"""Routing on Triton: four launches forward, one backward; nothing waits for the device.

Legend: T tokens, E experts, K experts a token, A = T * K assignments, B token blocks, R rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.moe import tuning
from mmkernels.moe.layout import Quotas, Route, static_rows
from mmkernels.moe.place_kernel import place_kernel
from mmkernels.moe.route_kernels import choose_kernel, list_kernel, scan_kernel, weight_grad_kernel


def triton_route(logits_TE: Tensor, top_k: int, capacity: int | None, drop_policy: str, quotas: Quotas | None) -> Route:
    """See `mmkernels.moe.route`, which has checked the arguments."""
    return Route(*_Route.apply(logits_TE, top_k, capacity, drop_policy, quotas), capacity)


class _Route(torch.autograd.Function):
    """Integers are constants; the weights' gradient goes to the chosen logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits_TE: Tensor, top_k: int, capacity: int | None, drop_policy: str, quotas: Quotas | None
    ) -> tuple[Tensor, ...]:
        weight_TK, expert_TK, *rest = _forward(logits_TE.contiguous(), top_k, capacity, drop_policy, quotas)
        ctx.experts = logits_TE.shape[1]
        ctx.save_for_backward(weight_TK, expert_TK)
        ctx.mark_non_differentiable(expert_TK, *rest)
        ctx.set_materialize_grads(False)
        return weight_TK, expert_TK, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dweight_TK: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None, None]:
        if dweight_TK is None:
            return None, None, None, None, None
        return _backward(dweight_TK.contiguous(), *ctx.saved_tensors, ctx.experts), None, None, None, None


def _forward(
    logits_TE: Tensor, top_k: int, capacity: int | None, drop_policy: str, quotas: Quotas | None
) -> tuple[Tensor, ...]:
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    padded = triton.next_power_of_2(experts)
    assignments, block_tokens = tokens * top_k, tuning.route_tokens(experts)
    blocks = triton.cdiv(tokens, block_tokens)
    rows = static_rows(tokens, top_k, experts, capacity)
    limit = max(assignments, 1) if capacity is None else min(capacity, max(assignments, 1))
    ranked = drop_policy == "probs" and (capacity is not None or quotas is not None)

    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    expert_TK, slot_TK = (torch.empty(tokens, top_k, dtype=torch.int32, device=device) for _ in range(2))
    token_R = torch.empty(rows, dtype=torch.int32, device=device)
    count_E, wanted_E, offset_E = (torch.empty(experts, dtype=torch.int32, device=device) for _ in range(3))
    # Scratch: bits to rank by, rank in the block; the same sorted by expert, with the assignment's number.
    priority_A, rank_A, list_priority_A, list_assignment_A = torch.empty(
        4, assignments, dtype=torch.int32, device=device
    )
    block_count_EB = torch.empty(experts, blocks, dtype=torch.int32, device=device)

    if tokens:
        choose_kernel[(blocks,)](
            logits_TE, weight_TK, expert_TK, priority_A, rank_A, block_count_EB, tokens, blocks,
            E=experts, K=top_k, EP=padded, BLOCK_T=block_tokens, PROBS=ranked,
            num_warps=tuning.warps(padded * block_tokens),
        )  # fmt: skip
    scan_kernel[(experts,)](block_count_EB, wanted_E, blocks, BLOCK_B=tuning.SCAN_BLOCK, num_warps=tuning.SCAN_WARPS)
    if tokens:
        block = tuning.list_block(experts)
        list_kernel[(triton.cdiv(assignments, block),)](
            expert_TK, priority_A, rank_A, block_count_EB, wanted_E, list_priority_A, list_assignment_A,
            assignments, blocks, E=experts, EP=padded, ASSIGNMENTS_PER_BLOCK=block_tokens * top_k, BLOCK_A=block,
            num_warps=tuning.LIST_WARPS,
        )  # fmt: skip
    quota_E = None if quotas is None else quotas(wanted_E)
    place_kernel[(experts,)](
        list_priority_A, list_assignment_A, wanted_E, slot_TK, token_R, count_E, offset_E, rows, limit, quota_E,
        E=experts, K=top_k, EP=padded, PROBS=ranked, QUOTAS=quotas is not None,
        BLOCK=tuning.PLACE_BLOCK, num_warps=tuning.PLACE_WARPS,
    )  # fmt: skip
    return weight_TK, expert_TK, slot_TK, token_R, count_E, wanted_E, offset_E


def _backward(dweight_TK: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int) -> Tensor:
    tokens, top_k = weight_TK.shape
    dlogits_TE = torch.empty(tokens, experts, dtype=torch.float32, device=weight_TK.device)
    padded, block_tokens = triton.next_power_of_2(experts), tuning.route_tokens(experts)
    if tokens:
        weight_grad_kernel[(triton.cdiv(tokens, block_tokens),)](
            dweight_TK, weight_TK, expert_TK, dlogits_TE, tokens, E=experts, K=top_k,
            EP=padded, KP=triton.next_power_of_2(top_k), BLOCK_T=block_tokens,
            num_warps=tuning.warps(padded * block_tokens),
        )  # fmt: skip
    return dlogits_TE

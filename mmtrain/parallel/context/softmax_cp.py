"""Softmax attention of a packed row whose chunks lie on several ranks.

A rank computes what its own tokens have in common by the packed kernels, as if there were no others, and then, for each
document that came from another chunk, the rectangle of its queries there and its earlier tails (`tails.py`). Outputs
join by their log-sum-exp; gradients of keys go back to their owners, in float32. Two ways to bring the tails:
`softmax_gather.py` and `softmax_ring.py`. For short chunks, `softmax_varlen.py` copies the keys of each piece of
queries together, and computes everything in one call.

Legend: S tokens here, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmtrain.parallel.context import softmax_gather, softmax_ring, softmax_varlen
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.context.softmax_parts import LocalPart
from mmtrain.parallel.context.tail_plan import TailPlan
from mmtrain.parallel.context.varlen_plan import VarlenPlan

WAYS = ("auto", "allgather", "ring", "varlen")
SHORT = 2048
"""Tokens of a chunk up to which "auto" computes all in one call.

On two H200s, 64:8 heads of 128, forward and backward TFLOP/s a GPU: chunks of 2,048 495 and 401, by the all-gather way,
whose many calls wait for the host, 506 and 208; chunks of 8,192 574 and 399, 507 and 439.
"""
BUDGET = 2**30
"""Bytes of the buffers of one group of key/value heads."""


def context_softmax(
    q_SHK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    packing: ContextPacking,
    group: ProcessGroup,
    way: str = "auto",
    budget: int = BUDGET,
) -> Tensor:
    """Causal softmax attention within each document of a row that the ranks of `group` share, scale 1 / sqrt(K).

    Every rank calls it, and runs its backward, in the same order; one that needs nothing of others gives what they
    need. Which rank has which chunk changes outputs by rounding alone.

    Args:
        q_SHK: queries of this rank's tokens, float32, bfloat16, float16 or float64.
        k_SGK: keys, in the dtype of q; G divides H, and is free otherwise.
        v_SGK: values, likewise.
        packing: the part of the row that lies here.
        group: its ranks. With NCCL, a collective has run in it before.
        way: "allgather" brings all tails that this rank needs, a group of key/value heads at a time; "ring" passes the
            tails of one rank after another, of all heads; "varlen" brings all tails of all heads, and copies them to
            all pieces of queries that need them; "auto" chooses.
        budget: bytes that the buffers of a group of heads may take; one head is brought at least. "varlen" keeps keys
            for the backward where they are less than a quarter of it.

    Returns:
        o_SHK in the dtype of q. Gradients flow to q, k and v; there are no second derivatives.

    Raises:
        ValueError: the way is unknown, or the group has another size than the row was shared out to.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}: allowed are {', '.join(WAYS)}")
    if group.size() != len(packing.shard.table):
        raise ValueError(f"a group of {group.size()} ranks for a row of {len(packing.shard.table)}")
    return _ContextSoftmax.apply(q_SHK, k_SGK, v_SGK, packing, group, way, budget)


def choose_way(plan: TailPlan, kv_heads: int, width: int, dtype: torch.dtype, budget: int) -> str:
    """The way of "auto": the same on all ranks.

    One call where chunks are short and its buffers within the budget: the work of a rectangle is then less than what
    starting and joining it takes.

    Otherwise all-gather, because each tail goes straight to whoever needs it, a rectangle has all its keys at once, and
    one join follows. A ring passes tails on through ranks that do not need them, cuts each rectangle into one for every
    rank, joins as often, and waits for the slowest rank at every step. It is taken for memory alone: where one head of
    all needed tails is over the budget, and all heads of one rank's tails are less than that. For a document of 1M
    tokens on 4 ranks, 8 heads of 128 in bfloat16, that is 4.3 GiB for one head at a time, and 12 GiB for the ring; for
    a single head on 16 ranks 4.1 and 0.4 GiB. (Arithmetic; the times are to be measured.)
    """
    if plan.shard.chunk_tokens <= SHORT and softmax_varlen.buffer_bytes(plan, kv_heads, width, dtype) <= budget:
        return "varlen"
    gather = softmax_gather.head_bytes(plan, width, dtype, backward=True)
    ring = softmax_ring.buffer_bytes(plan, kv_heads, width, dtype)
    return "ring" if gather > budget and ring < gather else "allgather"


def plan_of(packing: ContextPacking) -> tuple[TailPlan, LocalPart]:
    """What all softmax layers need of a row; see `ContextPacking.planned`."""
    plan = TailPlan.of(packing.shard)
    return plan, LocalPart.of(plan, packing)


def varlen_of(packing: ContextPacking) -> VarlenPlan:
    """What they need for one call, likewise."""
    return VarlenPlan.of(*packing.planned(plan_of))


class _ContextSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: ContextPacking, group: ProcessGroup,
        way: str, budget: int,
    ) -> Tensor:  # fmt: skip
        plan, local = packing.planned(plan_of)
        if way == "auto":
            way = choose_way(plan, *k_SGK.shape[1:], k_SGK.dtype, budget)
        varlen, keys = None, (k_SGK, v_SGK)  # or those of all pieces, which backward needs instead
        if not plan.crosses:
            o_SHK, lse_HS = local.forward(q_SHK, k_SGK, v_SGK)
        elif way == "varlen":
            varlen = packing.planned(varlen_of)
            o_SHK, lse_HS, kv_B2GK = softmax_varlen.forward(q_SHK, k_SGK, v_SGK, varlen, group)
            if softmax_varlen.keeps(plan, *k_SGK.shape[1:], k_SGK.dtype, budget):
                keys = (kv_B2GK,)
        elif way == "allgather":
            o_SHK, lse_HS = softmax_gather.forward(q_SHK, k_SGK, v_SGK, plan, local, group, budget)
        else:
            o_SHK, lse_HS = softmax_ring.forward(q_SHK, k_SGK, v_SGK, plan, local, group)
        ctx.save_for_backward(q_SHK, o_SHK, lse_HS, *keys)
        ctx.plan, ctx.local, ctx.varlen, ctx.group, ctx.way, ctx.budget = plan, local, varlen, group, way, budget
        return o_SHK

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_SHK: Tensor) -> tuple[Tensor | None, ...]:
        q_SHK, o_SHK, lse_HS, *keys = ctx.saved_tensors
        do_SHK = do_SHK.contiguous()
        if ctx.varlen is not None:
            kv_B2GK = keys[0] if len(keys) == 1 else softmax_varlen.bring(*keys, ctx.varlen, ctx.group)
            grads = softmax_varlen.backward(do_SHK, q_SHK, kv_B2GK, o_SHK, lse_HS, ctx.varlen, ctx.plan, ctx.group)
            return *grads, None, None, None, None
        tensors = (do_SHK, q_SHK, *keys, o_SHK, lse_HS)
        if not ctx.plan.crosses:
            grads = ctx.local.backward(*tensors)
        elif ctx.way == "allgather":
            grads = softmax_gather.backward(*tensors, ctx.plan, ctx.local, ctx.group, ctx.budget)
        else:
            grads = softmax_ring.backward(*tensors, ctx.plan, ctx.local, ctx.group)
        return *grads, None, None, None, None

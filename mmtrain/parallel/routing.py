"""Routing across ranks, all of it: micro-batches whose tokens lie on several ranks, capacity that several micro-batches
pool, and fractions of the whole global batch.

Legend: T tokens of this rank, N tokens of all W ranks, L layers, E experts, K experts a token, R rows, M micro-batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkernels.moe import Quotas, Route
from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.router import LocalMicroBatch, MicroBatch, RoutingScope
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.collectives import gather_alike, sum_gradient
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.mesh import ParallelContext


def apply_routing(model: HybridLM, context: ParallelContext, config: ParallelConfig) -> None:
    """Tell the routers of a (meta) model which tokens they take as one: this is the only place that does."""
    scope = _scope(context, config)
    for block in model.layers:
        if isinstance(block.ffn, MoE):
            block.ffn.router.scope = scope
            if config.aux_loss_over == "global_batch":
                block.ffn.router.use_global_fractions()


def update_load_fractions(model: HybridLM, assigned_LE: Tensor, skipped: Tensor) -> None:
    """Give the routers the fractions of a step for the next one, if they take those of a global batch.

    Args:
        assigned_LE: float64 whole numbers, assignments of the global batch for every layer of the whole model.
        skipped: bool scalar, whether the step does not count: fractions stay what they were.
    """
    for layer, block in zip(model.layer_numbers, model.layers, strict=True):
        if isinstance(block.ffn, MoE):
            block.ffn.router.update_fractions(assigned_LE[layer], skipped)


def _scope(context: ParallelContext, config: ParallelConfig) -> RoutingScope:
    layout, tp_group = context.layout, context.dense["tp"].get_group()
    micro_batch: MicroBatch = LocalMicroBatch()
    if layout.cp > 1:
        micro_batch = ContextMicroBatch(context)
    elif layout.tp > 1:  # experts that other ranks hold are called with the whole micro-batch's route
        micro_batch = (FullMicroBatch if layout.ep * layout.etp > 1 else SplitMicroBatch)(tp_group)
    pool = PooledCapacity(context) if config.global_router else None
    return RoutingScope(micro_batch, pool, config.micro_batch_rows if config.aux_loss_over == "sequence" else 1)


class SplitMicroBatch:
    """A micro-batch whose tokens lie in consecutive parts on the ranks of a group, and are routed together.

    Logits are small (E numbers a token), so every rank gathers them all and routes them alike.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather(self, logits_TE: Tensor, packing: Packing | None) -> Tensor:
        """Logits of all tokens, [N, E]."""
        return gather_alike(logits_TE, self.group)

    def local_route(self, plan: Route, packing: Packing | None) -> Route:
        """This rank's part of the route of N tokens, its rows numbered by expert, then by token."""
        return part_of(plan, dist.get_rank(self.group), dist.get_world_size(self.group))


class FullMicroBatch(SplitMicroBatch):
    """A micro-batch split over ranks, whose experts are called with the route of all its N tokens.

    Each rank then sends its own share of the rows (`parallel/expert`).
    """

    def local_route(self, plan: Route, packing: Packing | None) -> Route:
        """The whole route; every rank needs the whole gradient of its weights."""
        return plan._replace(weight_TK=sum_gradient(plan.weight_TK, self.group))


class ContextMicroBatch:
    """A micro-batch whose chunks lie on the ranks of cp, and a rank's tokens in equal parts on those of tp.

    It is routed as a whole, in the order of its row, so that which rank has which chunk changes nothing. Each rank then
    runs, or sends to other ranks' experts, the rows of its own tokens: how many an expert keeps of them is free, up to
    all that the micro-batch may send it, and no slots are set aside for that.
    """

    def __init__(self, context: ParallelContext) -> None:
        layout = context.layout
        self.group = context.dense["cp", "tp"]._flatten("micro_batch").get_group()
        self.tp_rank, self.tp = context.dense["tp"].get_local_rank(), layout.tp
        self.local_experts = layout.ep * layout.etp == 1

    def gather(self, logits_TE: Tensor, packing: Packing | None) -> Tensor:
        """Logits of all tokens in the order of the row, [N, E]."""
        assert isinstance(packing, ContextPacking)
        shard = packing.shard
        by_rank = gather_alike(logits_TE, self.group).unflatten(0, (shard.num_chunks, shard.chunk_tokens))
        return by_rank.index_select(0, packing.place_M).flatten(0, 1)

    def local_route(self, plan: Route, packing: Packing | None) -> Route:
        """The route of this rank's tokens, its rows numbered by expert, then by token."""
        assert isinstance(packing, ContextPacking)
        part = tokens_of(plan, packing.index_S.chunk(self.tp)[self.tp_rank])
        return part if self.local_experts else part._replace(capacity=None)  # rows of exact size travel


def part_of(plan: Route, rank: int, ranks: int) -> Route:
    """The plan of one of `ranks` equal parts of the tokens, as :func:`tokens_of` gives it."""
    if ranks == 1:
        return plan
    tokens = plan.row_TK.shape[0] // ranks
    return tokens_of(plan, slice(rank * tokens, (rank + 1) * tokens))


def tokens_of(plan: Route, mine: slice | Tensor) -> Route:
    """The plan of some of the tokens, by their places in ascending order. Nothing waits for the device.

    Rows that a plan numbers by expert, then by token, keep their order in a part: an assignment's new row is how many
    of the part's come before it. `assigned_E` stays that of all tokens.
    """
    row_TK, expert_TK = plan.row_TK[mine], plan.expert_TK[mine]
    tokens = row_TK.shape[0]
    kept_A, expert_A = (row_TK >= 0).flatten(), expert_TK.flatten().long()
    count_E = torch.zeros_like(plan.count_E).scatter_add_(0, expert_A, kept_A.int())
    offset_E = count_E.cumsum(0, dtype=torch.int32)
    top_k = expert_TK.shape[1]
    rows = min(tokens * top_k, plan.token_R.shape[0])
    # Sorted by its row in the whole plan, the i-th kept assignment gets row i.
    order_A = torch.where(kept_A, row_TK.flatten(), plan.token_R.shape[0]).argsort(stable=True)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    new_row_TK = torch.where(kept_A, place_A, -1).int().view_as(row_TK)
    token_R = torch.where(torch.arange(rows, device=order_A.device) < offset_E[-1], order_A[:rows] // top_k, -1).int()
    weight_TK, whole_E = plan.weight_TK[mine], plan.assigned_E
    return Route(weight_TK, expert_TK, new_row_TK, token_R, count_E, whole_E, offset_E, plan.capacity)


class PooledCapacity:
    """The global router: ranks that send to the same copies of the experts pool each expert's capacity.

    One all-gather of E counts a rank; the pool is shared out to micro-batches in proportion to their demand. Where
    one wants less of an expert than its share, another may keep more (MiniMax-01 section 3: global router). Where
    capacities differ, as they do with padding, the pool is their sum, and each rank sends its own with its counts.
    """

    def __init__(self, context: ParallelContext) -> None:
        mesh = context.expert["ep", "etp"]
        self.group = mesh._flatten().get_group()
        self.ranks_each = context.layout.cp * context.layout.tp  # they hold one micro-batch together

    def quotas(self, capacity: int, differs: bool = False) -> Quotas:
        """For `route`: what this rank's micro-batch may keep of each expert.

        Args:
            capacity: of this micro-batch alone.
            differs: whether other micro-batches may have another; the same on all ranks.
        """

        def quota(assigned_E: Tensor) -> Tensor:
            sent = F.pad(assigned_E, (0, 1), value=capacity) if differs else assigned_E
            everyone = gather_alike(sent, self.group).view(-1, sent.numel())[:: self.ranks_each]
            assigned_ME, capacity_M = everyone[:, : assigned_E.numel()], everyone[:, assigned_E.numel() :]
            pool = capacity_M.sum() if differs else capacity * assigned_ME.shape[0]
            return share_out(assigned_ME, pool)[self.group.rank() // self.ranks_each]

        return quota


def share_out(assigned_ME: Tensor, pool: int | Tensor) -> Tensor:
    """Quotas int32 [M, E] of `pool` slots an expert, by largest remainder; ties go to the lower micro-batch.

    Where no more than the pool are assigned, every micro-batch keeps all of its own; else the quotas sum to the pool,
    and none is larger than what is assigned.
    """
    assigned = assigned_ME.long()
    total_E = assigned.sum(0)
    scaled = assigned * pool
    floor = scaled // total_E.clamp(min=1)
    left_E = pool - floor.sum(0)
    order = (scaled - floor * total_E).argsort(dim=0, descending=True, stable=True)
    place = torch.arange(order.shape[0], device=order.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, place)
    shared = floor + (rank < left_E)
    return torch.where(total_E <= pool, assigned, shared).int()

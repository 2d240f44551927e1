"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Experts are shared out over the axis ep; each lies in slices of its width F on the ranks of the axis etp, which need not
be those of tensor parallelism (MiniMax-01 section 3: ETP). Dispatch: all-to-all over ep, then all-gather over etp.
Combine: reduce-scatter over etp, then all-to-all over ep. A rank's tokens are its own: no other rank has them.

Legend: T tokens of this rank, D model width, E experts of all ranks, L experts of this rank, W ranks along ep, P ranks
along etp, G groups, R rows to send, S rows that arrive, C capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from mmkernels.moe import Route, permute, unpermute
from mmtrain.config import ParallelConfig
from mmtrain.model.experts import Experts
from mmtrain.model.model import HybridLM
from mmtrain.model.moe import MoE
from mmtrain.parallel.collectives import exchange_rows, gather_alike, gather_rows, scatter_sum_rows
from mmtrain.parallel.local import place


def apply_expert_parallel(model: HybridLM, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Share the experts of a (meta) model out over `mesh`, which has the axes ep and etp."""
    call = ExchangedExperts(mesh, config.token_groups)
    for block in model.layers:
        assert isinstance(block.ffn, MoE)
        experts = block.ffn.experts
        place(experts, "w13_E2FD", mesh, (Shard(0), Shard(2)))
        place(experts, "w2_EDF", mesh, (Shard(0), Shard(2)))
        experts.call = call


class ExchangedExperts:
    """Rows of exact size: every rank learns how many each other one sends, and the host waits for these counts."""

    def __init__(self, mesh: DeviceMesh, groups: int = 1) -> None:
        """`mesh` has the axes ep and etp; the experts of a rank are run in `groups` parts, one after another."""
        self.ep, self.etp = mesh["ep"].get_group(), mesh["etp"].get_group()
        self.all = mesh._flatten().get_group()
        self.ranks, self.slices = mesh["ep"].size(), mesh["etp"].size()
        self.rank, self.slice = mesh["ep"].get_local_rank(), mesh["etp"].get_local_rank()
        self.groups = groups

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """See :class:`~mmtrain.model.experts.ExpertCall`."""
        held = plan.count_E.shape[0] // self.ranks
        order = send_order(self.ranks, held, self.groups)
        sent = in_order(plan, order)
        x_RD = permute(x_TD, sent)
        counts = self._counts(plan, order)
        arrivals, first = [], 0
        for group in range(self.groups):
            part = counts[:, :, group]  # [W senders, P slices, W receivers, L/G]
            rows = part[self.rank, self.slice].sum(-1)
            chosen = slice(group * held // self.groups, (group + 1) * held // self.groups)
            y_ND = self._run(experts, x_RD[first : first + int(rows.sum())], part, chosen)
            arrivals.append(y_ND)
            first += int(rows.sum())
        y_RD = torch.cat([*arrivals, x_RD.new_zeros(x_RD.shape[0] - first, x_RD.shape[1])])
        return unpermute(y_RD, plan.weight_TK, sent)

    def _counts(self, plan: Route, order: Tensor) -> Tensor:
        """Rows that each rank sends, on the host: int64 [W, P, G, W, L/G], by sender, group, receiver, expert."""
        mine_E = plan.count_E[order.to(plan.count_E.device)]
        everyone = gather_alike(mine_E, self.all)
        shape = (self.ranks, self.slices, self.groups, self.ranks, -1)
        return everyone.to("cpu", torch.int64).view(shape)

    def _run(self, experts: Experts, x_ND: Tensor, part: Tensor, chosen: slice) -> Tensor:
        """One group: rows to their experts and back, in the order they came."""
        send = part[self.rank, self.slice].sum(-1).tolist()
        receive = part[:, self.slice, self.rank].sum(-1).tolist()
        arrived = exchange_rows(x_ND, send, receive, self.ep)
        segments = part[:, :, self.rank].transpose(0, 1)  # [P, W, L/G]: rows in the order in which they lie
        longest = int(segments.sum((1, 2)).max())
        padded = torch.cat([arrived, arrived.new_zeros(longest - arrived.shape[0], arrived.shape[1])])
        gathered = gather_rows(padded, self.etp)
        sort = sort_by_expert(segments, longest, gathered.device)
        y_SD = experts.products(permute(gathered, sort), sort.offset_E, chosen)
        back = scatter_sum_rows(unpermute(y_SD, sort.weight_TK, sort), self.etp)
        return exchange_rows(back[: arrived.shape[0]], receive, send, self.ep)


def send_order(ranks: int, held: int, groups: int) -> Tensor:
    """Experts in the order in which their rows are sent: by group, then by receiver, int64 [E]."""
    return torch.arange(ranks * held).view(ranks, groups, held // groups).transpose(0, 1).flatten()


def in_order(plan: Route, order_E: Tensor) -> Route:
    """The same plan with its rows sorted by the experts' place in `order_E`, then by token."""
    order_E = order_E.to(plan.count_E.device)
    sorted_E = plan.count_E[order_E]
    begin_E = torch.empty_like(sorted_E)
    begin_E[order_E] = sorted_E.cumsum(0, dtype=torch.int32) - sorted_E
    shift_E = begin_E - (plan.offset_E - plan.count_E)
    slot_TK = torch.where(plan.slot_TK >= 0, plan.slot_TK + shift_E[plan.expert_TK.long()], -1).int()
    rows, tokens = plan.token_R.shape[0], torch.arange(slot_TK.shape[0], dtype=torch.int32, device=slot_TK.device)
    token_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=slot_TK.device)
    token_R[torch.where(slot_TK >= 0, slot_TK, rows).long()] = tokens[:, None].expand_as(slot_TK)
    return plan._replace(slot_TK=slot_TK, token_R=token_R[:rows])


def sort_by_expert(segments: Tensor, longest: int, device: torch.device) -> Route:
    """A plan that sorts arrived rows by expert: each row is a token with one assignment of weight 1.

    Args:
        segments: rows of each segment, on the host [P, W, L]; a block of W * L of them fills `longest` rows at most.
        longest: rows of a block.
        device: where the rows are.
    """
    blocks, ranks, held = segments.shape
    total = blocks * longest
    expert = torch.arange(held).expand(blocks, ranks, held)
    place = torch.full((total,), -1, dtype=torch.int64)
    owner = torch.full((total,), -1, dtype=torch.int64)
    for block in range(blocks):
        counts = segments[block].flatten()
        owner[block * longest : block * longest + int(counts.sum())] = expert[block].flatten().repeat_interleave(counts)
    order = torch.where(owner >= 0, owner, held).argsort(stable=True)
    used = int((owner >= 0).sum())
    place[order[:used]] = torch.arange(used)
    count_E = segments.sum((0, 1))
    token_R = torch.cat([order[:used], torch.full((total - used,), -1)])
    as_int = [x.to(torch.int32).to(device) for x in (owner.clamp(min=0)[:, None], place[:, None], token_R, count_E)]
    offset_E = count_E.cumsum(0).to(torch.int32).to(device)
    one_S1 = torch.ones(total, 1, dtype=torch.float32, device=device)
    return Route(one_S1, *as_int, as_int[-1], offset_E)

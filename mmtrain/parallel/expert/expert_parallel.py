"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Experts are shared out over the axis ep; each lies in slices of its width F on the ranks of the axis etp, which need not
be those of tensor parallelism (MiniMax-01 section 3: ETP).

Ranks of tensor parallelism hold parts of one micro-batch, whose capacity is the micro-batch's, not a part's. So that
places are not needed for each part, these ranks gather the tokens and share each expert's places out among themselves.
Where they are also the ranks that hold the slices of an expert, and their experts' ranks are near, each sends all the
tokens' rows to its slice instead: they need not be gathered along etp, and results are summed as tokens, not as rows.

Legend: T tokens of this rank, N tokens of the micro-batch, D model width, E experts of all ranks, L experts of this
rank, W ranks along ep, P ranks along etp, R rows to send, C places of one expert for one sender.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from mmkernels.moe import Arrivals, Route, to_places
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.experts import Experts
from mmtrain.model.moe.layer import MoE
from mmtrain.model.weights import local
from mmtrain.parallel.collectives import gather_into, gather_rows, scatter_sum_rows
from mmtrain.parallel.dtensor_params import shard_parameter
from mmtrain.parallel.expert.comm_streams import Lanes, Meter
from mmtrain.parallel.expert.dispatcher import Collectives, Reading
from mmtrain.parallel.expert.overlap import Job, run_groups
from mmtrain.parallel.expert.peer_buffers import Desks, reach
from mmtrain.parallel.expert.token_groups import Places, cut, exact_groups, in_parts, parts_of
from mmtrain.parallel.nccl import in_line, one_host
from mmtrain.parallel.routing import part_of


def apply_expert_parallel(model: HybridLM, mesh: DeviceMesh, call: ExchangedExperts) -> None:
    """Share the experts of a (meta) model out over `mesh`, which has the axes ep and etp.

    Args:
        call: what all layers run their experts with.
    """
    for block in model.layers:
        assert isinstance(block.ffn, MoE)
        experts = block.ffn.experts
        shard_parameter(experts, "w13_E2FD", mesh, (Shard(0), Shard(2)))
        shard_parameter(experts, "w2_EDF", mesh, (Shard(0), Shard(2)))
        experts.call = call


class ExchangedExperts:
    """Runs experts that other ranks hold, in groups, with rows on their way while others are multiplied.

    A single group, whose rows nothing hides, is read out of the other GPUs' memory, where all of them are on one host.
    Under a capacity, shapes are fixed and the host never waits for the device. Without one, or where micro-batches pool
    theirs, every host learns how many rows each rank sends, for which it waits.

    Attributes:
        lanes: where communication runs.
        whole: whether each rank of tensor parallelism sends all the micro-batch's rows, to its slice of the experts.
        desks: where the rows of a single group under a capacity are read by other ranks; None if collectives move them.
        how: which of them, and why.

    Args:
        mesh: with the axes ep and etp.
        tensor: the ranks that hold parts of one micro-batch.
        groups: see `parallel.token_groups`.
        exchange: see `parallel.exchange`.

    Raises:
        ConfigError: rows are to be read, and these ranks cannot read each other's memory.
    """

    def __init__(
        self, mesh: DeviceMesh, tensor: ProcessGroup, device: torch.device, groups: int = 1, exchange: str = "auto"
    ) -> None:
        self.tensor, self.device = tensor, device
        self.ranks, self.slices = mesh["ep"].size(), mesh["etp"].size()
        self.rank, self.slice = mesh["ep"].get_local_rank(), mesh["etp"].get_local_rank()
        self.ep, self.etp, self.all = mesh["ep"].get_group(), mesh["etp"].get_group(), mesh._flatten().get_group()
        # P times the rows then travel along ep, but none along etp: right unless ep leaves the host.
        same = dist.get_process_group_ranks(tensor) == dist.get_process_group_ranks(self.etp)
        self.whole = same and self.slices > 1 and one_host(self.ep)
        self.lanes, self.exchange = Lanes(device), exchange
        self._places: dict[tuple[int, int, int], Places] = {}
        self.groups = groups

    @property
    def groups(self) -> int:
        """Into how many groups each rank's experts are cut."""
        return self._groups

    @groups.setter
    def groups(self, number: int) -> None:
        self._groups = number
        self.lanes.aside = number > 1  # one group has nothing to compute meanwhile
        self._links = (self.ep, self.etp) if number > 1 else self._in_line
        self.desks, self.how = (None, f"collectives: token_groups={number}") if number > 1 else self._reach

    @cached_property
    def _in_line(self) -> tuple[ProcessGroup, ProcessGroup]:
        return in_line(self.ep, self.device), in_line(self.etp, self.device)

    @cached_property
    def _reach(self) -> tuple[Desks | None, str]:
        return reach(self.ep, self.device, self.exchange, whole_rows=self.slices == 1 or self.whole)

    def _collectives(self, along_etp: bool) -> Collectives:
        ep, etp = self._links
        return Collectives(ep, etp if along_etp and self.slices > 1 else None, self.lanes)

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """See :class:`~mmtrain.model.moe.experts.ExpertCall`; the plan is that of all N tokens."""
        parts = parts_of(local(experts.w2_EDF).shape[0], self.groups)
        if plan.capacity is None:
            mine = part_of(plan, self.tensor.rank(), self.tensor.size())
            return self._exact(experts, x_TD, in_parts(mine, parts), parts)
        plan = in_parts(plan._replace(capacity=min(plan.capacity, plan.slot_TK.shape[0])), parts)
        first, capacity = self._share(plan.capacity)
        places = self._places_of(plan.count_E.numel() // self.ranks, capacity)
        sent = to_places(plan, places.start_E, first, capacity)
        count_A = sent.count_E.new_empty(self.all.size() * sent.count_E.numel())
        counted = self.lanes.run("counts", lambda: gather_into(count_A, sent.count_E, self.all))
        x_ND = gather_rows(x_TD, self.tensor)

        def sortings() -> list[Arrivals]:
            self.lanes.wait(counted)
            count_WPWL = count_A.view(self.ranks, self.slices, self.ranks, -1)
            senders = slice(self.slice, self.slice + 1) if self.whole else slice(None)
            return places.sortings(count_WPWL[:, senders, self.rank])

        direct = self.desks is not None
        travel = Reading(self.desks, sent.token_R, self.lanes) if direct else self._collectives(not self.whole)
        job = Job(places.groups, sortings, travel, parts)
        return scatter_sum_rows(
            run_groups(x_ND, sent, local(experts.w13_E2FD), local(experts.w2_EDF), job), self.tensor
        )

    def _share(self, capacity: int) -> tuple[int, int]:
        """The places of each expert that this rank sends to: the first one's number, and how many."""
        if self.whole:
            return 0, capacity
        share = -(-capacity // self.tensor.size())
        return self.tensor.rank() * share, share

    def _places_of(self, held: int, capacity: int) -> Places:
        key = (held, self.groups, capacity)
        if key not in self._places:
            slices = 1 if self.whole else self.slices
            self._places[key] = Places(self.ranks, slices, cut(held, self.groups), capacity, self.device)
        return self._places[key]

    def _exact(self, experts: Experts, x_TD: Tensor, plan: Route, parts: int) -> Tensor:
        """Rows of exact size: the host waits to know it."""
        held = plan.count_E.numel() // self.ranks
        cuts = cut(held, self.groups)
        sent = in_order(plan, send_order(self.ranks, held, cuts).to(plan.count_E.device))
        count_A = plan.count_E.new_empty(self.all.size() * plan.count_E.numel())
        gather_into(count_A, plan.count_E, self.all)
        count_WPWL = count_A.to("cpu", torch.int64).view(self.ranks, self.slices, self.ranks, held)
        groups, sortings = exact_groups(count_WPWL, cuts, self.rank, self.slice, x_TD.device)
        job = Job(groups, lambda: sortings, self._collectives(True), parts)
        return run_groups(x_TD, sent, local(experts.w13_E2FD), local(experts.w2_EDF), job)


def send_order(ranks: int, held: int, cuts: list[slice]) -> Tensor:
    """Experts in the order in which their rows are sent: by group, then by receiver, int64 [E]."""
    expert_WL = torch.arange(ranks * held).view(ranks, held)
    return torch.cat([expert_WL[:, part].flatten() for part in cuts])


def in_order(plan: Route, order_E: Tensor) -> Route:
    """The same plan with its rows sorted by the experts' place in `order_E`, then by token."""
    sorted_E = plan.count_E[order_E]
    begin_E = torch.empty_like(sorted_E)
    begin_E[order_E] = sorted_E.cumsum(0, dtype=torch.int32) - sorted_E
    shift_E = begin_E - (plan.offset_E - plan.count_E)
    slot_TK = torch.where(plan.slot_TK >= 0, plan.slot_TK + shift_E[plan.expert_TK.long()], -1).int()
    rows, number_T = plan.token_R.shape[0], torch.arange(slot_TK.shape[0], dtype=torch.int32, device=slot_TK.device)
    token_R = torch.full((rows + 1,), -1, dtype=torch.int32, device=slot_TK.device)
    token_R[torch.where(slot_TK >= 0, slot_TK, rows).long()] = number_T[:, None].expand_as(slot_TK)
    return plan._replace(slot_TK=slot_TK, token_R=token_R[:rows])


class CommTimes(NamedTuple):
    """Times of communication."""

    seconds: float
    waited_seconds: float


class ExpertExchange(ExchangedExperts):
    """Shim."""

    def start_timing(self) -> None:
        self.lanes.meter = Meter()

    def read_times(self) -> CommTimes:
        return CommTimes(*self.lanes.read())

    @property
    def exchange_reason(self) -> str:
        return self.how

    def close(self) -> None:
        self.desks = None

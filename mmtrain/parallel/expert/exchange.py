"""The experts' exchange: tokens travel to the ranks that hold their experts, and back.

Ranks of tensor parallelism hold parts of one micro-batch, whose capacity is the micro-batch's, not a part's. So that
slots are not needed for each part, these ranks gather the tokens and share each expert's slots out among themselves.
Where they are also the ranks that hold the slices of an expert, and their experts' ranks are near, each sends all the
tokens' rows to its slice instead: they need not be gathered along etp, and results are summed as tokens, not as rows.

Legend: T tokens of this rank, N tokens of the micro-batch, D model width, E experts of all ranks, L experts of this
rank, F expert width (of this rank's slice), W ranks along ep, P ranks along etp, R rows to send, A numbers of all
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from mmkernels.moe import ReceivedRows, Route, to_slots
from mmtrain.model.moe.experts import Experts
from mmtrain.model.weights import local
from mmtrain.parallel.collectives import gather_into, gather_rows, scatter_sum_rows
from mmtrain.parallel.expert.comm_streams import CommStreams, CommTimes
from mmtrain.parallel.expert.connection import Connection, connect_in_line, connect_overlapped
from mmtrain.parallel.expert.dispatcher import AllToAllDispatcher, PeerReadDispatcher, TokenDispatcher
from mmtrain.parallel.expert.overlap import GroupSchedule, run_token_groups
from mmtrain.parallel.expert.process_groups import ExpertGroups
from mmtrain.parallel.expert.token_groups import (
    SlotLayout,
    chunks_per_expert,
    exact_groups,
    reorder_rows,
    send_order,
    split_experts,
    split_into_chunks,
)
from mmtrain.parallel.nccl import one_host
from mmtrain.parallel.routing import part_of


def build_exchange(
    mesh: DeviceMesh, tp_group: ProcessGroup, device: torch.device, token_groups: int = 1, exchange: str = "auto"
) -> ExpertExchange:
    """Build the exchange of the experts that lie on a mesh. COLLECTIVE over all ranks.

    Args:
        mesh: with the axes ep and etp.
        tp_group: ranks of tensor parallelism, which hold parts of one micro-batch.
        device: of this rank.
        token_groups: see `parallel.token_groups`.
        exchange: see `parallel.exchange`.

    Raises:
        ConfigError: rows are to be read directly, and these ranks cannot read each other's memory.
    """
    built = ExpertExchange(ExpertGroups.from_mesh(mesh, tp_group), device, exchange)
    built.set_token_groups(token_groups)
    return built


class ExpertExchange:
    """Runs experts that other ranks hold, in token groups, with rows on their way while others are multiplied.

    A single group, whose rows nothing hides, is read out of the other GPUs' memory, where all of them are on one host.
    Under a capacity, shapes are fixed and the host never waits for the device. Without one, or where micro-batches pool
    theirs, every host learns how many rows each rank sends, for which it waits.

    It runs once :meth:`set_token_groups` has connected it, as :func:`build_exchange` does.

    Attributes:
        groups: process groups, and this rank's places in them.
        full_micro_batch: whether each rank of tensor parallelism sends all the micro-batch's rows, to its slice of the
            experts.
    """

    def __init__(self, groups: ExpertGroups, device: torch.device, exchange: str = "auto") -> None:
        self.groups, self.device, self._exchange = groups, device, exchange
        # P times the rows then travel along ep, but none along etp: right unless ep leaves the host.
        self.full_micro_batch = groups.etp_is_tp and groups.etp_size > 1 and one_host(groups.ep_group)
        self._streams = CommStreams(device)
        self._slot_layouts: dict[tuple[int, int, int], SlotLayout] = {}
        self._send_orders: dict[tuple[int, int], Tensor] = {}
        self._connection: Connection | None = None
        self._in_line: Connection | None = None  # kept while several groups are in use

    @property
    def token_groups(self) -> int:
        """Number of groups that each rank's experts are split into."""
        return self._connected.token_groups

    @property
    def exchange_reason(self) -> str:
        """Way that rows move, and why: "direct", or "collectives: " and the reason."""
        return self._connected.choice.reason

    @property
    def peer_reads(self) -> bool:
        """Whether rows of a single group under a capacity are read out of peer buffers."""
        return self._connected.choice.peer_buffers is not None

    def set_token_groups(self, number: int) -> None:
        """Split each rank's experts into `number` groups from the next call on. COLLECTIVE over all ranks.

        The first time that it is a single group, process groups with all of NCCL's channels are made, and memory is
        mapped. They are kept for the next time until :meth:`close`; several groups need none of it.

        Raises:
            ConfigError: rows are to be read directly, and these ranks cannot read each other's memory.
        """
        if number == 1:
            self._connection = self._in_line = self._in_line or connect_in_line(
                self.groups, self.device, self._exchange, ep_alone=self.groups.etp_size == 1 or self.full_micro_batch
            )
        else:
            self._connection = connect_overlapped(self.groups, number)
        self._streams.asynchronous = number > 1  # one group has nothing to compute meanwhile

    def start_timing(self) -> None:
        """Time communication from now on, from zero."""
        self._streams.start_timing()

    def read_times(self) -> CommTimes:
        """Stop timing, and give the times since :meth:`start_timing`; zeros without it. Waits for the device."""
        return self._streams.read_times()

    def close(self) -> None:
        """Give back the peer buffers, streams and process groups made here. COLLECTIVE over all ranks.

        The mesh's groups stay. Afterwards :meth:`set_token_groups` connects it anew, and another exchange can be built.
        After the loss of a rank it would wait in vain: leave all of it to the end of the process then.
        """
        self._streams.close()
        if self._in_line is not None:
            self._in_line.close()
        self._connection = self._in_line = None
        self._slot_layouts.clear()
        self._send_orders.clear()

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """Weighted sum over each token's kept experts, [T, D]; `plan` is that of all N tokens, or of these T."""
        chunks = chunks_per_expert(plan.count_E.numel() // self.groups.ep_size, self.token_groups)
        if plan.capacity is None:
            own = plan.row_TK.shape[0] == x_TD.shape[0]  # as context parallelism gives it
            mine = plan if own else part_of(plan, self.groups.tp_group.rank(), self.groups.tp_group.size())
            return self._run_exact(experts, x_TD, split_into_chunks(mine, chunks), chunks)
        plan = plan._replace(capacity=min(plan.capacity, plan.row_TK.shape[0]))
        return self._run_slots(experts, x_TD, split_into_chunks(plan, chunks), chunks)

    def _run_slots(self, experts: Experts, x_TD: Tensor, plan: Route, chunks: int) -> Tensor:
        """Run the experts under a capacity, with slots that every rank knows."""
        groups, streams = self.groups, self._streams
        first, capacity = self._slot_share(plan.capacity)
        layout = self._slot_layout(plan.count_E.numel() // groups.ep_size, capacity)
        sent = to_slots(plan, layout.start_E, first, capacity)
        count_A = sent.count_E.new_empty(groups.ep_etp_group.size() * sent.count_E.numel())
        counted = streams.run("counts", lambda: gather_into(count_A, sent.count_E, groups.ep_etp_group))
        x_ND = gather_rows(x_TD, groups.tp_group)

        def receive() -> list[ReceivedRows]:
            streams.wait(counted)
            count_WPWL = count_A.view(groups.ep_size, groups.etp_size, groups.ep_size, -1)
            senders = slice(groups.etp_rank, groups.etp_rank + 1) if self.full_micro_batch else slice(None)
            return layout.sort_received(count_WPWL[:, senders, groups.ep_rank])

        dispatcher = self._slot_dispatcher(sent.token_R)
        schedule = GroupSchedule(layout.groups, receive, dispatcher, chunks, experts.chunk_rows)
        y_ND = run_token_groups(x_ND, sent, local(experts.w13_E2FD), local(experts.w2_EDF), schedule)
        return scatter_sum_rows(y_ND, groups.tp_group)

    def _run_exact(self, experts: Experts, x_TD: Tensor, plan: Route, chunks: int) -> Tensor:
        """Run the experts with rows of exact size: the host waits for the device once, to know how many there are."""
        groups, local_experts = self.groups, plan.count_E.numel() // self.groups.ep_size
        splits = split_experts(local_experts, self.token_groups)
        sent = reorder_rows(plan, self._send_order(local_experts, splits))
        count_A = plan.count_E.new_empty(groups.ep_etp_group.size() * plan.count_E.numel())
        gather_into(count_A, plan.count_E, groups.ep_etp_group)
        count_WPWL = count_A.view(groups.ep_size, groups.etp_size, groups.ep_size, local_experts)
        host_WPWL = count_WPWL.to("cpu", torch.int64)  # waits
        token_groups, received = exact_groups(count_WPWL, host_WPWL, splits, groups.ep_rank, groups.etp_rank)
        dispatcher = self._all_to_all(along_etp=True)
        schedule = GroupSchedule(token_groups, lambda: received, dispatcher, chunks, experts.chunk_rows)
        return run_token_groups(x_TD, sent, local(experts.w13_E2FD), local(experts.w2_EDF), schedule)

    @property
    def _connected(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the experts' exchange is closed: call set_token_groups(n), on all ranks, to open it")
        return self._connection

    def _slot_dispatcher(self, token_R: Tensor) -> TokenDispatcher:
        if (buffers := self._connected.choice.peer_buffers) is not None:
            return PeerReadDispatcher(buffers, token_R, self._streams)
        return self._all_to_all(along_etp=not self.full_micro_batch)

    def _all_to_all(self, along_etp: bool) -> AllToAllDispatcher:
        etp_group = self._connected.etp_group if along_etp and self.groups.etp_size > 1 else None
        return AllToAllDispatcher(self._connected.ep_group, etp_group, self._streams)

    def _slot_share(self, capacity: int) -> tuple[int, int]:
        """Slots of each expert that this rank sends to: the first one's number, and how many."""
        if self.full_micro_batch:
            return 0, capacity
        share = -(-capacity // self.groups.tp_group.size())
        return self.groups.tp_group.rank() * share, share

    def _send_order(self, local_experts: int, splits: Sequence[slice]) -> Tensor:
        """Order of experts in a sender's rows of exact size, brought to the device once: that waits for it too."""
        key = (local_experts, len(splits))
        if key not in self._send_orders:
            self._send_orders[key] = send_order(self.groups.ep_size, local_experts, splits).to(self.device)
        return self._send_orders[key]

    def _slot_layout(self, local_experts: int, capacity: int) -> SlotLayout:
        """Layout of the slots of this many experts (or chunks of experts) a rank, made once."""
        key = (local_experts, self.token_groups, capacity)
        if key not in self._slot_layouts:
            slices = 1 if self.full_micro_batch else self.groups.etp_size
            splits = split_experts(local_experts, self.token_groups)
            self._slot_layouts[key] = SlotLayout(self.groups.ep_size, slices, splits, capacity, self.device)
        return self._slot_layouts[key]

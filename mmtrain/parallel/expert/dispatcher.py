"""Token dispatchers: rows go to the ranks that have their experts, are sorted there, and come back.

Collectives move them, or each rank reads its rows where they lie.

Legend: R rows to send and to get back, D model width, M rows received, S received rows sorted by expert, W ranks along
ep, P ranks along etp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.moe import ReceivedRows, take_rows
from mmtrain.parallel.collectives import exchange_into, gather_into, scatter_sum_into
from mmtrain.parallel.expert.comm_streams import CommStreams, Work
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.expert.token_groups import TokenGroup

InFlight = tuple[Tensor, Work]
"""Memory that receives rows, and the handle of the work that brings them."""


class TokenDispatcher(Protocol):
    """The way of a token group's rows to the ranks that have its experts, and back.

    As dispatch and combine are each other's transpose, gradients take them too.
    """

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Memory in which rows to dispatch have to be made; None for any."""

    def dispatch(self, group: TokenGroup, x_RD: Tensor) -> InFlight:
        """Send a group's rows to the ranks that have its experts."""

    def permute(self, in_flight: InFlight, received: ReceivedRows) -> Tensor:
        """Received rows in the order of their experts, [M, D]; rows past the last may hold anything."""

    def combine(self, group: TokenGroup, y_SD: Tensor, received: ReceivedRows, into_RD: Tensor) -> Work:
        """Send sorted rows back to where they came from, into the group's rows of `into`."""

    def wait(self, works: Sequence[Work]) -> None:
        """Let the computing stream go on when the rows that :meth:`combine` sent have come."""


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Dispatch: all-to-all over ep, all-gather over etp. Combine: reduce-scatter over etp, all-to-all over ep.

    Attributes:
        ep_group: ranks that hold different experts.
        etp_group: ranks that hold slices of the same experts; None if rows do not travel along it.
        streams: where collectives run.
    """

    ep_group: ProcessGroup
    etp_group: ProcessGroup | None
    streams: CommStreams

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Any memory will do."""

    def dispatch(self, group: TokenGroup, x_RD: Tensor) -> InFlight:
        """Start the collectives that bring P * padded rows here."""
        arrived = x_RD.new_empty(group.padded, x_RD.shape[1])
        exchange = partial(
            exchange_into,
            arrived[: group.received],
            x_RD[group.rows],
            group.receive_counts,
            group.send_counts,
            self.ep_group,
        )
        work = self.streams.run("ep", exchange)
        if self.etp_group is None:
            return arrived, work
        gathered = x_RD.new_empty(self.etp_group.size() * group.padded, x_RD.shape[1])
        return gathered, self.streams.run("etp", partial(gather_into, gathered, arrived, self.etp_group), work)

    def permute(self, in_flight: InFlight, received: ReceivedRows) -> Tensor:
        """Wait for the rows, and sort them into memory of their own."""
        rows_MD, work = in_flight
        self.streams.wait(work)
        return take_rows(rows_MD, received.source_M, clear=False)

    def combine(self, group: TokenGroup, y_SD: Tensor, received: ReceivedRows, into_RD: Tensor) -> Work:
        """Put the rows back into the order in which they came, and start the collectives that return them."""
        work, rows_MD = None, take_rows(y_SD, received.target_M, clear=False)
        summed = rows_MD
        if self.etp_group is not None:
            summed = rows_MD.new_empty(group.padded, rows_MD.shape[1])
            work = self.streams.run("etp", partial(scatter_sum_into, summed, rows_MD, self.etp_group))
        exchange = partial(
            exchange_into,
            into_RD[group.rows],
            summed[: group.received],
            group.send_counts,
            group.receive_counts,
            self.ep_group,
        )
        return self.streams.run("ep", exchange, work)

    def wait(self, works: Sequence[Work]) -> None:
        """Wait for each of them."""
        for work in works:
            self.streams.wait(work)


@dataclass(frozen=True)
class PeerReadDispatcher:
    """Rows are staged in this rank's peer buffers, both ways, where the others read them: one token group, in line.

    Attributes:
        buffers: of the ranks along ep.
        token_R: negative for slots that are empty, which nobody reads.
        streams: of which the times are kept.
    """

    buffers: PeerBuffers
    token_R: Tensor
    streams: CommStreams

    def send_buffer(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The peer buffer of the next exchange."""
        return self.buffers.stage(rows, width, dtype)

    def dispatch(self, group: TokenGroup, x_RD: Tensor) -> InFlight:
        """Nothing to send: the rows were made in the peer buffer."""
        return x_RD, Work(None)

    def permute(self, in_flight: InFlight, received: ReceivedRows) -> Tensor:
        """Read the rows out of the peer buffers, in the order of their experts."""
        x_SD = torch.empty_like(in_flight[0])
        self.streams.run("ep", partial(self.buffers.read, x_SD, source_M=received.source_M))
        return x_SD

    def combine(self, group: TokenGroup, y_SD: Tensor, received: ReceivedRows, into_RD: Tensor) -> Work:
        """Stage the rows in the order in which they came, and read this rank's own out of the peer buffers."""
        staged_RD = self.buffers.stage(*y_SD.shape, y_SD.dtype)
        take_rows(y_SD, received.target_M, clear=False, out=staged_RD)
        return self.streams.run("ep", partial(self.buffers.read, into_RD, used_M=self.token_R))

    def wait(self, works: Sequence[Work]) -> None:
        """Nothing is on its way any more."""

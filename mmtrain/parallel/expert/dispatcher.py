"""How rows get to the ranks that have their experts, sorted there, and back: by collectives, or read where they lie.

Legend: R rows to send and to get back, D model width, M rows that arrive, S the same sorted by expert, W ranks along
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

from mmkernels.moe import Arrivals, take_rows
from mmtrain.parallel.collectives import exchange_into, gather_into, scatter_sum_into
from mmtrain.parallel.expert.comm_streams import Lanes, Pending
from mmtrain.parallel.expert.peer_buffers import Desks
from mmtrain.parallel.expert.token_groups import Group

Arriving = tuple[Tensor, Pending]
"""Rows as they arrive, and when they have."""


class Travel(Protocol):
    """The way of a group's rows to the ranks that have its experts, and back.

    As each way is the other's transpose, gradients take the same two.
    """

    def memory(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where rows to send off have to be made; None for anywhere."""

    def out(self, group: Group, x_RD: Tensor) -> Arriving:
        """Send a group's rows off."""

    def sorted(self, arriving: Arriving, sorting: Arrivals) -> Tensor:
        """Those that arrive, [M, D], in order of their experts; what is past the last may hold anything."""

    def home(self, group: Group, y_SD: Tensor, sorting: Arrivals, into_RD: Tensor) -> Pending:
        """Send sorted rows back to where they came from, into the group's rows of `into`."""

    def wait(self, homes: Sequence[Pending]) -> None:
        """Let the computing stream go on when rows are home."""


@dataclass(frozen=True)
class Collectives:
    """Out: all-to-all over ep, all-gather over etp. Home: reduce-scatter over etp, all-to-all over ep.

    Attributes:
        etp: None if rows do not travel along it.
    """

    ep: ProcessGroup
    etp: ProcessGroup | None
    lanes: Lanes

    def memory(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """See :class:`Travel`."""

    def out(self, group: Group, x_RD: Tensor) -> Arriving:
        """See :class:`Travel`; P * padded rows arrive."""
        arrived = x_RD.new_empty(group.padded, x_RD.shape[1])
        exchange = partial(
            exchange_into, arrived[: group.arriving], x_RD[group.rows], group.receive, group.send, self.ep
        )
        pending = self.lanes.run("ep", exchange)
        if self.etp is None:
            return arrived, pending
        gathered = x_RD.new_empty(self.etp.size() * group.padded, x_RD.shape[1])
        return gathered, self.lanes.run("etp", partial(gather_into, gathered, arrived, self.etp), pending)

    def sorted(self, arriving: Arriving, sorting: Arrivals) -> Tensor:
        """See :class:`Travel`."""
        rows_MD, pending = arriving
        self.lanes.wait(pending)
        return take_rows(rows_MD, sorting.source_M, clear=False)

    def home(self, group: Group, y_SD: Tensor, sorting: Arrivals, into_RD: Tensor) -> Pending:
        """See :class:`Travel`."""
        pending, rows_MD = None, take_rows(y_SD, sorting.place_M, clear=False)
        arrived = rows_MD
        if self.etp is not None:
            arrived = rows_MD.new_empty(group.padded, rows_MD.shape[1])
            pending = self.lanes.run("etp", partial(scatter_sum_into, arrived, rows_MD, self.etp))
        into = into_RD[group.rows]
        back = partial(exchange_into, into, arrived[: group.arriving], group.send, group.receive, self.ep)
        return self.lanes.run("ep", back, pending)

    def wait(self, homes: Sequence[Pending]) -> None:
        """See :class:`Travel`."""
        for pending in homes:
            self.lanes.wait(pending)


@dataclass(frozen=True)
class Reading:
    """Rows are left on this rank's desk, out and home, where the others read them: one group, in line.

    Attributes:
        token_R: negative for places that are empty, which nobody reads.
        lanes: of which the times are kept.
    """

    desks: Desks
    token_R: Tensor
    lanes: Lanes

    def memory(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Travel`: the desk."""
        return self.desks.lay(rows, width, dtype)

    def out(self, group: Group, x_RD: Tensor) -> Arriving:
        """See :class:`Travel`; they lie on the desk."""
        return x_RD, Pending(None)

    def sorted(self, arriving: Arriving, sorting: Arrivals) -> Tensor:
        """See :class:`Travel`."""
        x_SD = torch.empty_like(arriving[0])
        self.lanes.run("ep", partial(self.desks.take, x_SD, source_M=sorting.source_M))
        return x_SD

    def home(self, group: Group, y_SD: Tensor, sorting: Arrivals, into_RD: Tensor) -> Pending:
        """See :class:`Travel`."""
        desk_RD = self.desks.lay(*y_SD.shape, y_SD.dtype)
        take_rows(y_SD, sorting.place_M, clear=False, out=desk_RD)
        return self.lanes.run("ep", partial(self.desks.take, into_RD, used_M=self.token_R))

    def wait(self, homes: Sequence[Pending]) -> None:
        """See :class:`Travel`: nothing is on its way any more."""

"""Connections that experts' rows travel through: process groups, or peer buffers that ranks read; and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from mmtrain.errors import ConfigError
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.expert.process_groups import ExpertGroups
from mmtrain.parallel.nccl import all_channels_group, one_host
from mmtrain.parallel.peers.mapping import Unreachable


class ExchangeChoice(NamedTuple):
    """The way that rows move.

    Attributes:
        peer_buffers: buffers that rows are read out of; None where collectives move them.
        reason: "direct", or "collectives" and why not directly, if `parallel.exchange` does not say so itself.
    """

    peer_buffers: PeerBuffers | None
    reason: str


def choose_exchange(ep_group: ProcessGroup, device: torch.device, exchange: str, ep_alone: bool) -> ExchangeChoice:
    """Choose how rows of a single token group move along ep. COLLECTIVE: where they may be read, memory is mapped.

    Args:
        ep_group: ranks that hold different experts.
        device: of this rank.
        exchange: `parallel.exchange`.
        ep_alone: whether rows travel along ep alone, and not along etp too.

    Raises:
        ConfigError: rows are to be read directly and cannot be.
    """
    if exchange == "collectives":
        return ExchangeChoice(None, exchange)
    reason = _obstacle(ep_group, ep_alone)
    if reason is None and exchange == "auto" and device.type != "cuda":
        return ExchangeChoice(None, "collectives: there is no GPU")
    try:
        if reason is None:
            return ExchangeChoice(PeerBuffers(ep_group, device), "direct")
    except Unreachable as error:
        reason = str(error)
    if exchange == "direct":
        raise ConfigError("parallel.exchange", exchange, reason, "give auto or collectives")
    return ExchangeChoice(None, f"collectives: {reason}")


def _obstacle(ep_group: ProcessGroup, ep_alone: bool) -> str | None:
    """Reason why rows cannot be read directly, as far as the layout tells."""
    if ep_group.size() == 1:
        return "parallel.ep=1"
    if not one_host(ep_group):
        return f"the {ep_group.size()} ranks of parallel.ep are not all on one host"
    return None if ep_alone else "rows travel along etp too"


@dataclass(frozen=True)
class Connection:
    """The process groups and buffers that rows travel through.

    Attributes:
        token_groups: number of groups that each rank's experts are split into.
        ep_group: for the all-to-alls.
        etp_group: for the all-gathers and reduce-scatters.
        choice: whether rows are read out of peer buffers instead.
        made: the process groups that were made for this connection.
    """

    token_groups: int
    ep_group: ProcessGroup
    etp_group: ProcessGroup
    choice: ExchangeChoice
    made: tuple[ProcessGroup, ...] = ()

    def close(self) -> None:
        """Unmap and free the peer buffers, and destroy the groups that were made. COLLECTIVE over all ranks."""
        if self.choice.peer_buffers is not None:
            self.choice.peer_buffers.close()
        for group in self.made:
            dist.destroy_process_group(group)


def connect_in_line(groups: ExpertGroups, device: torch.device, exchange: str, ep_alone: bool) -> Connection:
    """Connect a single token group, beside whose communication nothing is computed. COLLECTIVE over all ranks.

    Args:
        groups: process groups of the mesh.
        device: of this rank.
        exchange: `parallel.exchange`.
        ep_alone: whether rows travel along ep alone, and not along etp too.

    Raises:
        ConfigError: rows are to be read directly and cannot be.
    """
    # Only tensors of the device travel here, so NCCL alone will do, and the groups can be destroyed and made again.
    ep_group = all_channels_group(groups.ep_group, device, host_tensors=False)
    etp_group = all_channels_group(groups.etp_group, device, host_tensors=False)
    pairs = (ep_group, groups.ep_group), (etp_group, groups.etp_group)
    made = tuple(group for group, given in pairs if group is not given)
    return Connection(1, ep_group, etp_group, choose_exchange(groups.ep_group, device, exchange, ep_alone), made)


def connect_overlapped(groups: ExpertGroups, token_groups: int) -> Connection:
    """Connect several token groups by the mesh's own process groups, which leave room for computing beside them."""
    choice = ExchangeChoice(None, f"collectives: token_groups={token_groups}")
    return Connection(token_groups, groups.ep_group, groups.etp_group, choice)

"""Process groups that may use the whole GPU: nothing is computed beside their collectives."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from mmtrain.config.process_env import read_processes

ALL_CHANNELS = 64
"""As many as NCCL has, each on one multiprocessor. Its own choice leaves room for computing beside them."""


def one_host(group: ProcessGroup) -> bool:
    """Whether no group of this axis leaves its host: the same answer on all ranks."""
    return never_leaves(dist.get_process_group_ranks(group), read_processes().local_world_size)


def never_leaves(ranks: Sequence[int], host_ranks: int) -> bool:
    """Whether groups like this one, which together cover all ranks, lie each on one host.

    Args:
        ranks: of one group, evenly spaced, as a mesh has them.
        host_ranks: ranks of a host, one after another; 0 if the launcher has not said how many.
    """
    spacing = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return host_ranks > 0 and host_ranks % (spacing * len(ranks)) == 0


def all_channels_group(group: ProcessGroup, device: torch.device, host_tensors: bool = True) -> ProcessGroup:
    """A second group of the same ranks, connected through all of NCCL's channels, where the way is NVLink.

    On four H200s that moves an all-to-all of 252 MB in 0.60 ms for 0.68, and on two an all-gather in 0.43 for 0.52. It
    takes memory: the first all-to-all 2.3 GiB on each, where NCCL's own choice takes 1.4. Between hosts, where the
    network is the limit, without NCCL, and where the environment says how many channels NCCL may use, the result is
    `group` itself.

    COLLECTIVE: every process has to call this for its group of an axis, all axes in the same order.

    Args:
        group: ranks of one axis of a mesh.
        device: of this rank.
        host_tensors: see :func:`with_channels`.
    """
    chosen = any(name in os.environ for name in ("NCCL_MIN_CTAS", "NCCL_MAX_CTAS"))
    if device.type != "cuda" or chosen or group.size() == 1 or not one_host(group):
        return group
    return with_channels(group, device, ALL_CHANNELS, host_tensors)


def with_channels(group: ProcessGroup, device: torch.device, channels: int, host_tensors: bool = True) -> ProcessGroup:
    """A second group of the same ranks, connected through so many of NCCL's channels. COLLECTIVE over all ranks.

    Args:
        group: the ranks.
        device: of this rank, a GPU.
        channels: from 1 to 64.
        host_tensors: whether the group also takes tensors of the host, by gloo. Such a group must live as long as the
            run: torch gives a group of the same ranks that is made later the same name in the store, where gloo would
            find the addresses of the destroyed one and wait for them for ever.
    """
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = channels
    options._timeout = group._get_backend(device).options._timeout
    return dist.new_group(dist.get_process_group_ranks(group), options._timeout, pg_options=options,
                          backend=None if host_tensors else "nccl", use_local_synchronization=True)  # fmt: skip

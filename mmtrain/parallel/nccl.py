"""Process groups whose collectives run in line: nothing is computed beside them, so they may use the whole GPU."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

ALL_CHANNELS = 64
"""As many as NCCL has, each on one multiprocessor. Its own choice leaves room for computing beside them."""


def one_host(group: ProcessGroup) -> bool:
    """Whether all ranks of the group are on one host, as far as the launcher has said how many a host has."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return local > 0 and len({rank // local for rank in dist.get_process_group_ranks(group)}) == 1


def in_line(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """The same ranks, connected through as many multiprocessors as NCCL can use, where the way is NVLink.

    On four H200s that moves an all-to-all of 252 MB in 0.60 ms for 0.68, and an all-gather in 0.43 for 0.52. Every rank
    of the group has to call this, in the same order. Between hosts, where the network is the limit, and without NCCL,
    it is the group itself.
    """
    if device.type != "cuda" or group.size() == 1 or not one_host(group):
        return group
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = ALL_CHANNELS
    ranks, timeout = dist.get_process_group_ranks(group), group._get_backend(device).options._timeout
    return dist.new_group(ranks, timeout, backend="nccl", pg_options=options, use_local_synchronization=True)

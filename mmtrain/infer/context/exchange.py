"""Rows of tensors between ranks that share a row, without autograd.

Legend: R ranks, S rows of a rank, T rows of all, D all further dimensions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.parallel.collectives import exchange_into, gather_into


def gather_shares(x_SD: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    """Return all ranks' rows, [T, D], in the order of the ranks.

    Args:
        x_SD: this rank's.
        sizes: rows of each rank.
        group: the ranks.
    """
    most, mine = max(sizes), x_SD.contiguous()
    if mine.shape[0] < most:  # NCCL gathers as many of each
        mine = mine.new_empty(most, *mine.shape[1:])
        mine[: x_SD.shape[0]] = x_SD
    all_D = gather_alike(mine, group)
    if min(sizes) == most:
        return all_D.flatten(0, 1)
    return torch.cat([part_D[:size] for part_D, size in zip(all_D, sizes, strict=True)])


def gather_alike(x_SD: Tensor, group: ProcessGroup) -> Tensor:
    """Return all ranks' rows, [R, S, D], of which each has as many."""
    out = x_SD.new_empty(group.size(), *x_SD.shape)
    gather_into(out.flatten(0, 1), x_SD.contiguous(), group)
    return out


def send_shares(x_TD: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    """Give each rank its share of this rank's rows; returns what all ranks have of this one's, [R, S, D].

    Args:
        x_TD: of all.
        sizes: rows of each rank.
        group: the ranks.
    """
    mine = sizes[group.rank()]
    out = x_TD.new_empty(len(sizes) * mine, *x_TD.shape[1:])
    exchange_into(out, x_TD.contiguous(), [mine] * len(sizes), sizes, group)
    return out.unflatten(0, (len(sizes), mine))


def join(x: Tensor, group: ProcessGroup) -> Tensor:
    """Add up tensors of which each element is zero on all ranks but one, in place: the same bits on all."""
    if x.numel():
        dist.all_reduce(x, group=group)
    return x

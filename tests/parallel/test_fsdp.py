"""The dimension along which a parameter is cut for FSDP."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from mmtrain.parallel.fsdp import free_dimension


@pytest.mark.parametrize(
    ("shape", "ranks", "dimension"),
    [
        ((4096, 1024), 4, None),
        ((257, 32), 4, None),  # a row more or less
        ((2, 4096, 1024), 2, None),
        ((2, 4096, 1024), 4, Shard(1)),
        ((16, 2, 512, 256), 32, Shard(2)),
        ((3, 5), 4, None),  # nothing is even
    ],
)
def test_ranks_hold_about_as_much_of_every_parameter(
    shape: tuple[int, ...], ranks: int, dimension: Shard | None
) -> None:
    assert free_dimension(nn.Parameter(torch.empty(shape, device="meta")), ranks) == dimension

"""Numbers on their way to a device: they lie where they should, and nothing else is written."""

from __future__ import annotations

import torch

from mmtrain.infer.serving.staging import Staging


def test_numbers_lie_at_the_beginning_of_memory_that_stays_where_it_is() -> None:
    staging = Staging(4, torch.device("cpu"))
    there = staging.there
    staging.send([1, -1, 1 << 40, 4])
    assert there.tolist() == [1, -1, 1 << 40, 4]
    there[3] = 5
    staging.send([7, 8])
    assert staging.there is there and there.tolist() == [7, 8, 1 << 40, 5]
    staging.send([])
    assert there.tolist() == [7, 8, 1 << 40, 5]

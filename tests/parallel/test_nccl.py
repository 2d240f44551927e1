"""Which groups stay on their host, by arithmetic."""

from __future__ import annotations

import pytest

from mmtrain.parallel.nccl import never_leaves


@pytest.mark.parametrize(
    ("ranks", "host_ranks", "expected"),
    [
        ([0, 1, 2, 3], 4, True),
        ([4, 5, 6, 7], 4, True),
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, False),
        ([1, 3], 4, True),  # every second one
        ([1, 5], 4, False),
        ([1, 5], 8, True),
        ([0, 2, 4, 6], 8, True),
        ([0, 1, 2, 3], 6, False),  # this one does not leave its host, but that of ranks 4 to 7 does
        ([3], 4, True),
        ([0, 1], 0, False),  # unknown
    ],
)
def test_groups_that_stay_on_their_host(ranks: list[int], host_ranks: int, expected: bool) -> None:
    assert never_leaves(ranks, host_ranks) == expected

"""Which tensors are copied on the device first."""

from __future__ import annotations

import pytest

from mmtrain.checkpoint.staging import first_held, held_bytes


@pytest.mark.parametrize(
    ("room", "first"), [(0, 4), (15, 4), (16, 3), (16 + 47, 3), (16 + 48, 2), (16 + 48 + 16, 1), (10**9, 0), (-5, 4)]
)
def test_the_last_ones_that_fit_are_held(room: int, first: int) -> None:
    assert first_held([100, 16, 33, 1], room) == first


def test_each_begins_where_any_dtype_can() -> None:
    assert [held_bytes(size) for size in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_a_large_one_in_between_ends_the_row() -> None:
    assert first_held([16, 1000, 16], 64) == 2

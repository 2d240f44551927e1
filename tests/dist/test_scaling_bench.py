"""The weak-scaling bench takes micro-batches that fit: on 80 GB GPUs it once died in the middle of a step."""

from __future__ import annotations

import pytest

from mmtrain.bench.scaling_gpu import rows_that_fit
from mmtrain.errors import ConfigError

GIB = 2**30
LAYOUTS = [(1, []), (4, ["parallel.ep=4"]), (4, ["parallel.ep=1"])]


def test_fewer_rows_where_memory_is_less() -> None:
    found = [rows_that_fit(8, LAYOUTS, memory * GIB) for memory in (70, 79, 140, 1000)]
    assert found == sorted(found) and found[-1] == 8 and found[1] < 8
    assert all(8 % each == 0 for each in found)


def test_all_layouts_count() -> None:
    alone = rows_that_fit(8, [(1, [])], 140 * GIB)
    shared = rows_that_fit(8, [(4, ["parallel.ep=4"])], 140 * GIB)
    assert rows_that_fit(8, LAYOUTS, 140 * GIB) == min(alone, shared, rows_that_fit(8, [LAYOUTS[2]], 140 * GIB))


def test_a_gpu_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="not one row of 8,192 tokens fits 20 GiB"):
        rows_that_fit(8, LAYOUTS, 20 * GIB)

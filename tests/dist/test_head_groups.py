"""Lightning layers that work on groups of heads, under parallelism: gradients are those of all heads at once."""

from __future__ import annotations

import pytest

from mmtrain.config import ParallelConfig
from tests.dist.pool import Pool
from tests.dist.test_ffn_chunks import DENSE, SHARED, assert_same, gradients

BLOCK = {"activation_checkpoint": "block"}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (DENSE, {"cp": 2, "cp_chunks": 2, **BLOCK}),
        (SHARED, {"tp": 2, "ep": 2, **BLOCK}),
        pytest.param(DENSE, {"cp": 2, "cp_chunks": 4}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"tp": 2}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"activation_checkpoint": "selective", "offload_block_inputs": 1}, marks=pytest.mark.slow),
        pytest.param(DENSE, {"pp": 2, **BLOCK, "offload_block_inputs": True}, marks=pytest.mark.slow),
        pytest.param(SHARED, {"cp": 2, "cp_chunks": 2, "ep": 2, **BLOCK}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_those_of_all_heads_at_once(pool: Pool, model: dict, layout: dict) -> None:
    expected = pool.run(gradients, model, ParallelConfig(**layout), world=2)
    found = pool.run(gradients, model, ParallelConfig(**layout, lightning_head_groups=2), world=2)
    assert_same(found, expected)

"""Layouts drawn at random, on 4 processes: those that fit train as one process does, the rest are refused at once."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mmtrain.config import ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import plan_layout
from tests.dist.layouts import SEQ, Job, train
from tests.dist.pool import Pool, WorkerError
from tests.dist.test_layouts import SHALLOW, check

WORLD, QUICK, ALL = 4, 1, 24


def draw(rng: random.Random) -> ParallelConfig:
    """Any options; most of them fit."""
    return ParallelConfig(
        cp=rng.choice([1, 1, 2, 4]),
        cp_chunks=rng.choice([1, 3, 4]),
        cp_table=rng.choice(["balanced", "zigzag", "contiguous"]),
        cp_softmax=rng.choice(["ring", "allgather", "varlen"]),
        tp=rng.choice([1, 2, 4, 8]),
        ep=rng.choice([1, 2, 4, 8]),
        etp=rng.choice([1, 2, 3, 4]),
        token_groups=rng.choice([1, 1, 2, 4]),
        activation_checkpoint=rng.random() < 0.5,
        reshard_after_forward=rng.random() < 0.5,
        sync_every_micro_batch=rng.random() < 0.5,
        aux_loss_over=rng.choice(["micro_batch", "sequence"]),
        lightning_head_groups=rng.choice([1, 2]),
    )


def drawn(seed: int, fits: bool) -> ParallelConfig:
    """The first draw that fits, or that does not."""
    rng = random.Random(seed)
    while True:
        parallel = draw(rng)
        try:
            plan_layout(WORLD, parallel, SHALLOW, [SEQ])
        except ConfigError:
            if not fits:
                return parallel
        else:
            if fits:
                return parallel


@pytest.mark.parametrize("seed", [s if s < QUICK else pytest.param(s, marks=pytest.mark.slow) for s in range(ALL)])
def test_a_layout_that_fits(pool: Pool, seed: int) -> None:
    check(pool, Job(replace(SHALLOW, shared_ffn_hidden_size=16 * (seed % 2)), drawn(seed, True), rows=8), WORLD)


@pytest.mark.parametrize("seed", range(5))
def test_a_layout_that_does_not_fit_starts_nothing(pool: Pool, seed: int) -> None:
    with pytest.raises(WorkerError, match=r"ConfigError: parallel\.") as caught:
        pool.run(train, Job(SHALLOW, drawn(seed, False)), world=WORLD)
    assert "init_process_group" not in str(caught.value)

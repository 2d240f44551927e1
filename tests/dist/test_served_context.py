"""An engine over ranks gives what an engine of one process gives: tokens, logits, states and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.dist.pool import Pool
from tests.dist.served_context import SCRIPTS, SHUFFLED, Scripts, Seen, alone, on_ranks, scored
from tests.infer.served import MODELS
from tests.model.small import relative

Of = Callable[[str], list[Seen]]
ALL = [*SCRIPTS, *SHUFFLED]


@lru_cache
def expected(name: str) -> list[Seen]:
    return alone(name, SCRIPTS)


@lru_cache
def expected_of_all(name: str) -> list[Seen]:
    return alone(name, ALL)


def alike(ours: Any, theirs: Any) -> bool:
    """Whether numbers in nested lists are the same, those that are no ids within 1e-5."""
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(alike(*pair) for pair in zip(ours, theirs, strict=True))
    return abs(ours - theirs) < 1e-5 if isinstance(theirs, float) else ours == theirs


def assert_same(ours: Seen, theirs: Seen, where: str) -> None:
    assert len(theirs.made) > 1 and alike(ours.made, theirs.made), where
    assert ours.metrics == theirs.metrics, where
    assert ours.logits.keys() == theirs.logits.keys(), where
    for row, logits in theirs.logits.items():
        torch.testing.assert_close(ours.logits[row], logits, rtol=0, atol=1e-5, msg=lambda text: f"{where}: {text}")
    assert ours.states.keys() == theirs.states.keys(), where
    for row, states in theirs.states.items():
        for mine, other in zip(ours.states[row], states, strict=True):
            assert relative(mine, other) < 1e-5, where


def check(
    pool: Pool, name: str, ranks: int, cut_tokens: int, scripts: Scripts = SCRIPTS, theirs: Of = expected
) -> None:
    """Every script on every rank, and all ranks to the same bits."""
    found = pool.run(on_ranks, name, scripts, cut_tokens, world=ranks)
    for number, (script, changes) in enumerate(scripts):
        where = f"{script.__name__} {changes} over {ranks} ranks, cut from {cut_tokens} tokens on"
        for rank in range(ranks):
            assert_same(found[rank][number], theirs(name)[number], f"rank {rank}: {where}")
            for row, logits in found[0][number].logits.items():
                assert torch.equal(found[rank][number].logits[row], logits), where


@pytest.mark.parametrize("cut_tokens", [1, 10, pytest.param(1000, marks=pytest.mark.slow)])
def test_ranks_give_what_one_process_gives(pool: Pool, cut_tokens: int) -> None:
    check(pool, "hybrid with experts", 2, cut_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_on_any_number_of_ranks(pool: Pool, name: str, ranks: int) -> None:
    for cut_tokens in (1, 12):
        check(pool, name, ranks, cut_tokens, ALL, expected_of_all)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("dense", torch.float64, 1e-12),
        ("hybrid with experts", torch.bfloat16, 0.05),
        ("lightning", torch.float32, 1e-5),  # without pages
    ],
)
def test_other_precisions(pool: Pool, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Partial attentions are joined in fp32 or wider; states are fp32 or wider."""
    scripts = [(scored, dict(prefill_tokens=11))]
    (theirs,) = alone(name, scripts, dtype)
    found = pool.run(on_ranks, name, scripts, 4, dtype, world=3)
    for rank, (ours,) in enumerate(found):
        for mine, first, other in zip(ours.made, found[0][0].made, theirs.made, strict=True):
            assert mine == first and mine == pytest.approx(other, abs=tolerance), rank

"""The stages of configs/stage that repeat each other's phases: they stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmdata.images.grid import RELEASED_GRIDS, TileRules, lay_image
from mmtrain.config import PhaseConfig
from mmtrain.config.cli import compose
from mmtrain.train.curriculum import scaled_phases

CONFIGS = Path(__file__).parents[2] / "configs"


def phases(stage: str, *overrides: str) -> list[PhaseConfig]:
    return compose([f"stage={stage}", "data.path=x", "run.name=y", *overrides], CONFIGS).stage.phases


def test_the_curriculum_is_pretraining_and_the_extension() -> None:
    assert phases("curriculum") == [*phases("pretrain"), *phases("long_ctx")]


@pytest.mark.parametrize(("number", "name"), list(enumerate(("128k", "512k", "1m"))))
def test_a_phase_alone_is_that_of_the_extension(number: int, name: str) -> None:
    (alone,) = phases(f"long_ctx_{name}")
    expected = phases("long_ctx")[number]
    assert alone == (expected if number == 0 else replace(expected, transition=0.0))


def test_the_extension_is_the_paper_s() -> None:
    """Table 6 of MiniMax-01 (FACTS 3.2)."""
    found = [(p.seq_len, p.rope_base, p.tokens, [b.share for b in p.buckets], p.long_share, p.long_last)
             for p in phases("long_ctx")]  # fmt: skip
    assert found == [
        (2**17, 5e6, 300 * 10**9, [0.3, 0.7, 0.0], 0.1, 0.2),
        (2**19, 1e7, 32 * 10**9, [0.35, 0.35, 0.3], 0.1, 0.2),
        (2**20, 1e7, 26 * 10**9, [0.3, 0.3, 0.4], 0.1, 0.2),
    ]


def test_a_scale_keeps_layouts_of_phases() -> None:
    given = phases("long_ctx", "stage.scale=1/128", "stage.phases.2.parallel={cp: 2}")
    assert [one.parallel.cp if one.parallel else None for one in given] == [None, None, 2]
    made = compose(["stage=long_ctx", "stage.scale=1/128", "data.path=x", "run.name=y",
                    "stage.phases.2.parallel={cp: 2}"], CONFIGS)  # fmt: skip
    assert scaled_phases(made.stage)[2].parallel == given[2].parallel


def test_seeing_is_its_three_stages_and_the_paper_s() -> None:
    """Stages I to III of MiniMax-VL-01 (FACTS 8)."""
    found = phases("vl")
    assert found == [*phases("vl_align"), *phases("vl_train"), *phases("vl_experience")]
    assert [one.tokens for one in found] == [80 * 10**9, 420 * 10**9 * 21 // 20, 44_800 * 10**6]
    assert [one.frozen for one in found] == [["*", "!encoder"], [], []]
    longest = max(lay_image(336 * columns, 336 * rows, TileRules()).tokens for rows, columns in RELEASED_GRIDS)
    assert all(one.seq_len > longest for one in found[1:])

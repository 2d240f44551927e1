"""Options of evaluations: off by default, entries of lists checked one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIVEN = ["stage=quickstart", "run.name=x", "data.path=none"]


def test_needles_are_off_by_default_and_lengths_are_counts() -> None:
    config = compose(GIVEN, CONFIGS)
    assert not config.evals.needles.enabled and config.evals.max_share == 0.02
    assert config.evals.needles.depths == [0.0, 0.25, 0.5, 0.75, 1.0]
    given = compose([*GIVEN, "evals.needles.lengths=[8Ki,1M]", "evals.needles.kinds=[multi]"], CONFIGS).evals.needles
    assert given.lengths == [8192, 1_000_000] and given.kinds == ["multi"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evals.needles.depths=[0.5,1.5]", r"evals.needles.depths\[1\]=1.5: must be at least 0 and at most 1"),
        ("evals.needles.depths=[-0.1]", r"evals.needles.depths\[0\]=-0.1: must be at least 0 and at most 1"),
        ("evals.needles.depths=[]", r"evals.needles.depths=\[\]: is empty"),
        ("evals.needles.depths=[0.5,0.5]", r"evals.needles.depths=\[0.5, 0.5\]: names one twice"),
        ("evals.needles.kinds=[singel]", r"evals.needles.kinds\[0\]=singel: not a known choice; did you mean 'single'"),
        ("evals.needles.lengths=[0]", r"evals.needles.lengths\[0\]=0: must be at least 1"),
        ("evals.needles.samples=0", "evals.needles.samples=0: must be at least 1"),
        ("evals.max_share=0.9", "evals.max_share=0.9: must be above 0 and at most 0.5"),
        ("evals.max_share=0", "evals.max_share=0.0: must be above 0"),
    ],
)
def test_wrong_options_are_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose([*GIVEN, override], CONFIGS)

"""What a launch refuses by its options alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.train.prepared_run import plan_launch

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("plan", ["true", "false"])
def test_a_model_with_eyes_is_not_trained_as_a_model_of_text(plan: str) -> None:
    config = compose(["model=tiny_vl", "run.name=a", "data.path=b", f"run.plan={plan}"], CONFIGS)
    with pytest.raises(ConfigError, match=r"model\.vision=tiny_vl: images are not trained on yet"):
        plan_launch(config)

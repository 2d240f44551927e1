"""Positions read back from checkpoints, old ones too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mmtrain.checkpoint.progress import Progress
from mmtrain.config.cli import compose
from mmtrain.train.position import checkpoint_position

CONFIGS = Path(__file__).parents[2] / "configs"


def test_an_old_record_of_steps_and_tokens_is_placed_by_its_own_stage(tmp_path: Path) -> None:
    stage = ["stage=long_ctx", "stage.scale=1/2048", "stage.batch_scale=1/16", "stage.token_scale=1/15000"]
    config = asdict(compose([*stage, "data.path=x", "run.name=r"], CONFIGS))
    phase, batch = config["stage"]["phases"][0], 1024  # tokens of a batch after scaling: 32Mi / 2048 / 16
    steps = -(-round(phase["tokens"] / 2048 / 15000) // batch)
    for extra, expected in (
        (0, Progress(steps, steps * batch, 0, steps * batch // 64, steps * batch)),
        (1, Progress(steps + 1, (steps + 1) * batch, 1, batch // 256, batch)),
    ):
        meta = {"step": steps + extra, "tokens": (steps + extra) * batch, "config": config}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        assert checkpoint_position(tmp_path) == expected


def test_a_record_with_phase_and_row_is_taken_as_it_is(tmp_path: Path) -> None:
    progress = Progress(7, 700, 2, 9, 80)
    (tmp_path / "meta.json").write_text(json.dumps({**asdict(progress), "config": {}}))
    assert checkpoint_position(tmp_path) == progress

"""The RoPE base of a checkpoint: from its record, else from its run's phases, else from its run's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.checkpoint.rope_base import rope_base_of
from mmtrain.errors import ConfigError


def record(*bases: float, **extra: object) -> dict:
    return {"step": 7, "config": {"stage": {"phases": [{"rope_base": base} for base in bases]}}, **extra}


def folder(run: Path) -> Path:
    path = run / "checkpoints" / "step-00000007"
    path.mkdir(parents=True)
    return path


def test_the_record_s_own_entry_comes_first(tmp_path: Path) -> None:
    assert rope_base_of(folder(tmp_path), record(1e4, 5e6, rope_base=1e7)) == 1e7
    assert rope_base_of(tmp_path, record(1e4, rope_base=1e7)) == 1e7


def test_phases_that_agree_say_it(tmp_path: Path) -> None:
    assert rope_base_of(folder(tmp_path), record(5e6, 5e6)) == 5e6


def test_metrics_know_the_base_of_the_step(tmp_path: Path) -> None:
    path = folder(tmp_path)
    lines = [{"step": 6, "rope_base": 1e4}, {"step": 7, "val_loss": 1.0}, {"step": 7, "rope_base": 5e6},
             {"step": 8, "rope_base": 1e7}]  # fmt: skip
    torn = '{"step": 7, "rope_ba'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    assert rope_base_of(path, record(1e4, 5e6, 1e7)) == 5e6


@pytest.mark.parametrize("metrics", [None, '{"step": 6, "rope_base": 1e4}\n{"step": 7, "val_loss": 1.0}\n'])
def test_an_unknown_base_is_asked_for(tmp_path: Path, metrics: str | None) -> None:
    path = folder(tmp_path)
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(ConfigError, match=r"RoPE base.*10000, 5e\+06.*--rope-base"):
        rope_base_of(path, record(5e6, 1e4))

"""The bench of eyes, tiny, on two processes: every figure comes, and shares of tiles are as said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.pool import Pool


def measure(out: str) -> None:
    from mmtrain.bench.vision_gpu import main

    main(["--smoke", "--out", out])


@pytest.mark.slow
def test_steps_are_measured(pool: Pool, tmp_path: Path) -> None:
    pool.run(measure, str(tmp_path), world=2)
    text, even, uneven = json.loads((tmp_path / "vision.json").read_text())["rows"]
    assert text["busiest_tiles"] == [0, 0] and text["max_over_mean"] is None
    assert even["max_over_mean"] < 1.1 < uneven["max_over_mean"]
    assert all(a <= b for a, b in zip(even["busiest_tiles"], uneven["busiest_tiles"], strict=True))
    assert even["loss"] == pytest.approx(uneven["loss"], abs=1e-2) and not {"error"} & even.keys()

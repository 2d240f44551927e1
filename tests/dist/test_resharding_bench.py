"""The bench of loads under another layout saves, lays the processes out anew, and loads both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.bench.resharding import measure
from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh
from tests.dist.pool import Pool


def load_elsewhere(folder: Path) -> None:
    try:
        measure(mesh.join(ClusterConfig(device="cpu")), "tiny", ["parallel.tp=2"], folder / "scratch", 2, folder)
    finally:
        mesh.stop()


@pytest.mark.slow
def test_figures_are_of_both_layouts(pool: Pool, tmp_path: Path) -> None:
    pool.run(load_elsewhere, tmp_path, world=2)
    found = json.loads((tmp_path / "resharding.json").read_text())
    assert "TP2" in found["under"] and found["bytes"] > 12 * 15e6
    for name in ("read_s", "ours_same_s", "dcp_same_s", "ours_other_s", "dcp_other_s"):
        assert len(found[name]) == 2 and min(found[name]) > 0

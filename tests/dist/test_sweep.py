"""Real sweeps, small ones: launch/sweep.py from its command line to points and fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.log.metrics import read_metrics
from mmtrain.scaling.points import read_points
from tests.dist.runs import ROOT, environment

SMALL = ("sweep=tiny_cpu", "sweep.compute=[]", "sweep.warmup=1", "sweep.seq_len=128", "sweep.batch_tokens=[1Ki]",
         "data.valid_rows=4", "sweep.validations=4", "cluster.device=cpu")  # fmt: skip


def sweep(folder: Path, corpus: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run launch/sweep.py."""
    arguments = ["-m", *SMALL, f"data.path={corpus}", f"sweep.dir={folder}", *overrides]
    return subprocess.run([sys.executable, "launch/sweep.py", *arguments], cwd=ROOT, env=environment(), text=True,
                          capture_output=True, check=False)  # fmt: skip


def test_two_points(corpus: Path, tmp_path: Path) -> None:
    sizes = "sweep.sizes=[{name: a, layers: 2, hidden: 16, ffn: 16}]"
    done = sweep(tmp_path, corpus, sizes, "sweep.architectures=[softmax,lightning]", "sweep.tokens=[4Ki]",
                 "sweep.fit=false")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs done, 6 points" in done.stdout.splitlines()[-1]
    for name in ("softmax-a-4.096K", "lightning-a-4.096K"):
        run = tmp_path / "tiny_cpu" / "runs" / name
        recorded = {record["tokens"]: record["val_loss"] for record in read_metrics(run) if "val_loss" in record}
        mine = {point.tokens: point.loss for point in read_points(tmp_path / "tiny_cpu") if point.run == name}
        assert mine == {tokens: loss for tokens, loss in recorded.items() if tokens > 1024}
        config = json.loads((run / "config.json").read_text())
        assert config["model"]["num_layers"] == 2 and (run / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.slow
def test_four_points_with_a_fit_and_a_timing(corpus: Path, tmp_path: Path) -> None:
    shapes = [f"{{name: s{width}, layers: 2, hidden: {width}, ffn: {2 * width}}}" for width in (16, 32, 48, 64)]
    sizes = f"sweep.sizes=[{', '.join(shapes)}]"
    arguments = (sizes, "sweep.architectures=[softmax]", "sweep.tokens=[16Ki]", "sweep.lr=[5e-3]")
    timed = sweep(tmp_path, corpus, *arguments, "--plan", "--timing")
    assert timed.returncode == 0 and timed.stderr.count("timed softmax") == 4
    done = sweep(tmp_path, corpus, *arguments)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs done, 16 points" in done.stdout and "mmtrain.scaling" in done.stdout.splitlines()[-1]
    assert {"fit.json", "fit.md", "fit.png"} <= {path.name for path in (tmp_path / "tiny_cpu").iterdir()}
    ends = [point for point in read_points(tmp_path / "tiny_cpu") if point.final]
    assert len(ends) == 4 and ends[0].loss > ends[-1].loss

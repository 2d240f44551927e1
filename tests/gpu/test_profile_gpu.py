"""launch/profile_step.py on a GPU: figures that only a device has, and the files that show them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.log.kernel_times import KINDS, OTHER
from tests.dist.runs import ROOT, SMALL, environment, make_corpus

pytestmark = pytest.mark.gpu
WIDE = ["model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=2", "model.head_dim=64",
        "model.rotary_dim=32", "model.ffn_hidden_size=512", "stage.phases.0.tokens=65536", "optim.precision=bf16",
        "cluster.device=auto"]  # fmt: skip


@pytest.mark.parametrize("graphs", ["auto", "false"])
def test_a_profile_of_a_gpu(tmp_path: Path, graphs: str) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "launch/profile_step.py", *SMALL, *WIDE, f"data.path={make_corpus(tmp_path)}", "run.name=x",
         f"run.dir={tmp_path / 'runs'}", f"parallel.cuda_graphs={graphs}", "--memory", "--out", str(out)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert not (tmp_path / "runs").exists()
    assert {path.name.removesuffix(".gz") for path in out.iterdir()} == {
        "report.json", "report.txt", "trace.json", "timeline.png", "memory.pickle"
    }  # fmt: skip
    found = json.loads((out / "report.json").read_text())
    assert 0 < found["busy"] < 1.05 and found["idle_ms"] >= 0 and found["exposed_ms"] >= 0
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert {"matrix products", "lightning attention", "softmax attention", "norms", "routing", "loss", "SwiGLU",
            "optimizer"} <= set(kinds) <= {*KINDS, OTHER}  # fmt: skip
    for kind in ("matrix products", "lightning attention", "softmax attention"):
        assert 0 < kinds[kind]["tflops"] < 1.05 * found["rate_tflops"]
    memory = found["memory_gib"]
    assert 0 < memory["peak allocated"] <= memory["peak reserved"] < found["device_gib"]
    assert found["graphs_possible"] == (graphs == "false")

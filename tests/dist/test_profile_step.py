"""launch/profile_step.py: trains as pretrain does, leaves a report and nothing else, and refuses what it cannot do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.parallel.layout import Layout
from mmtrain.runs.profile_figures import operations
from mmtrain.runs.step_profiler import TIMED
from tests.dist.runs import SMALL, environment, pretrain, steps
from tests.dist.warm import run_script

LONG = "stage.phases.0.tokens=16384"  # 32 steps


def profile(*arguments: str, processes: int | None = None) -> subprocess.CompletedProcess:
    return run_script("launch/profile_step.py", arguments, environment(), processes, timeout=300)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_a_profile_trains_as_the_run_does_and_does_not_block_it(corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, LONG, f"data.path={corpus}", f"run.dir={tmp_path / 'runs'}", "run.name=mine",
              "parallel.micro_batch_rows=4"]  # fmt: skip  # a trace of two micro-batches a step, not of eight
    out = tmp_path / "out"
    done = profile(*common, "--steps", "2", "--warmup", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no run folder, so no checkpoint
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.txt", "trace.json"]
    assert done.stdout == (out / "report.txt").read_text()
    found = read(out)
    assert found["steps"] == 2 and found["timed"] == TIMED and len(found["losses"]) == 1 + TIMED + 2
    assert found["tokens"] == 512 and found["busy"] is None and found["gaps"] == [] and len(found["ranks"]) == 1
    assert found["memory_gib"]["optimizer"] == pytest.approx(2 * found["memory_gib"]["parameters"], rel=1e-2)
    assert found["memory_gib"]["gradients"] == pytest.approx(found["memory_gib"]["parameters"])
    products = next(row for row in found["kinds"] if row["kind"] == "matrix products")
    assert products["tflops"] > 0 and products["floor_ms"] > 0 and products["launches"] > 50
    assert any(event.get("name") == "aten::mm" for event in json.loads((out / "trace.json").read_text())["traceEvents"])

    pretrain(*common, "run.max_steps=8", processes=None)  # of the same name: nothing is in its way
    assert [row["loss"] for row in steps(tmp_path / "runs/mine")] == found["losses"]


@pytest.mark.slow
def test_a_run_is_profiled_from_its_checkpoint_and_left_as_it_was(corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, LONG, f"data.path={corpus}", f"run.dir={tmp_path / 'runs'}", "run.name=mine", "run.resume=auto"]
    pretrain(*common, "run.max_steps=2", processes=None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    done = profile(*common, "--steps", "1", "--warmup", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before
    assert "after step 2" in done.stdout
    pretrain(*common, "run.max_steps=9", processes=None)
    assert [row["loss"] for row in steps(tmp_path / "runs/mine")[2:]] == read(tmp_path / "out")["losses"]


@pytest.mark.slow
def test_ranks_stand_side_by_side(corpus: Path, tmp_path: Path) -> None:
    done = profile(*SMALL, LONG, f"data.path={corpus}", f"run.dir={tmp_path / 'runs'}", "run.name=mine",
                   "parallel.tp=2", "parallel.ep=2", "--warmup", "1", "--out", str(tmp_path), processes=2)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(tmp_path)
    assert [row["rank"] for row in found["ranks"]] == [0, 1] and not (tmp_path / "runs").exists()
    assert done.stdout.count("median of") == 1  # rank 0 alone tells it
    assert any(row["kind"] == "communication" for row in found["kinds"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "error: --steps=0: must be at least 1"),
        (["--warmup", "0"], "error: --warmup=0: must be at least 1"),
        (
            ["--steps", "9"],
            "error: --steps=9: with 5 of warm-up, 5 timed these are 19 steps, and phase quickstart has",
        ),
        (["--memory"], "error: --memory=True: torch keeps no history of a CPU's memory"),
        (["--plan"], "error: run.plan=True: trains no step"),
        (["--out", "/proc/none", LONG], "error: --out=/proc/none: cannot be written"),
        (["--steps", "abc"], "error: argument --steps: invalid int value: 'abc'; see --help"),
        (["model.top_k=9"], "error: model.top_k=9"),
        (["--stepps"], "error: --stepps"),
    ],
)
def test_what_cannot_be_profiled_is_told_in_one_line(
    corpus: Path, tmp_path: Path, wrong: list[str], message: str
) -> None:
    done = profile(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=mine", *wrong)
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_operations_of_a_rank_add_up_to_the_step() -> None:
    model = ModelConfig("small", vocab_size=64, num_layers=4, layer_pattern="LLLS", hidden_size=32, num_heads=2,
                        num_kv_heads=1, head_dim=16, rotary_dim=8, num_experts=4, top_k=2,
                        ffn_hidden_size=24)  # fmt: skip
    lengths, dropped = [10, 30], [0.0, 0.5, 0.0, 0.5]
    whole = step_flops(model, lengths, kept_assignments=40 * 2 * 3)
    found = operations(model, lengths, dropped, Layout(pp=1, dp=2, cp=1, tp=1, edp=2, ep=1, etp=1))
    assert set(found) == {"matrix products", "lightning attention", "softmax attention"}
    assert sum(found.values()) == pytest.approx(whole.total - 3 * whole.by_part["router"])
    half = operations(model, lengths, dropped, Layout(pp=1, dp=1, cp=1, tp=2, edp=1, ep=2, etp=1))
    assert half == {kind: count / 2 for kind, count in found.items()}

"""The GPU bench without a GPU: its arithmetic, its report, and every group on tiny CPU tensors with a stub timer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import errors, inputs, machine, moe, peers, plot, report, run, softmax
from bench.gpu.harness import Bench
from bench.gpu.table import Goal, Label, Peer, Row, floor_goal, ratio, ratio_goal, tidy
from mmkernels.moe import permute, route, unpermute

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "gpu" / "run.py"
LABEL = Label("group", "what", "T=1")


def timer(call: Any) -> float:
    call()
    return 2.0


def fail() -> None:
    raise torch.OutOfMemoryError("no room\nsecond line")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """On the CPU at 1000 GB/s, two milliseconds a call, lengths of at most 8; FLA is missing."""
    monkeypatch.setattr(peers, "missing_fla", lambda: "not in tests")
    return Bench(torch.device("cpu"), 1000.0, timer, timer, lambda function: function, limit=8)


def result_of(rows: list[Row], **more: Any) -> dict[str, Any]:
    result = {
        "device": "NVIDIA H100", "gpu": "h100", "date": "2026-01-31", "versions": {"torch": "2.11", "fla": None},
        "fla_missing": None, "copy_gbps": 3019.8, "matmul_tflops": 745.0, "quick": False, "groups": ["lightning"],
        "group_seconds": {}, "seconds": 3.0, "rows": [row.as_dict() for row in rows], "errors": [],
    }  # fmt: skip
    return result | more


def test_floor_fraction_and_ratio(bench: Bench) -> None:
    row = bench.add(LABEL, lambda: None, Peer("them", lambda: None), floor=1e9, goal=floor_goal(0.5))
    assert (row.ours_ms, row.peer_ms, row.floor_ms, row.of_floor, row.ratio_to_peer) == (2.0, 2.0, 1.0, 0.5, 1.0)
    assert row.reached is True and row.goal == "0.50 of the floor"
    assert ratio(1.0, None) is None and ratio("Error", 1.0) is None and ratio(1.0, 0.0) is None


def test_both_ways_times_each_with_its_floor_and_the_others(bench: Bench) -> None:
    x = torch.ones(3, requires_grad=True)
    calls: list[bool] = []

    def ours() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return 2 * x

    rows = bench.both_ways(
        LABEL, ours, Peer("them", None), (x,), torch.ones(3), floors=(4e9, 11e9), others={"plain": lambda: x * 2},
        derive=lambda row, back: row.extra.update(back=back),
    )  # fmt: skip
    assert [row.name for row in rows] == ["what forward", "what forward+backward"] and rows == bench.rows
    assert [row.floor_ms for row in rows] == [4.0, 11.0] and calls == [False, True]
    assert [row.extra for row in rows] == [{"plain_ms": 2.0, "back": back} for back in (False, True)]
    assert all(row.peer == "them" and row.peer_ms is None and row.ratio_to_peer is None for row in rows)


def test_what_raises_is_reported_and_not_fatal(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    mine = bench.add(LABEL, fail, Peer("them", lambda: None), floor=1e9, goal=ratio_goal(1.0))
    theirs = bench.add(LABEL, lambda: None, Peer("them", fail), goal=ratio_goal(1.0), others={"plain": fail})
    assert mine.ours_ms == "OutOfMemoryError" and mine.reached is False and mine.of_floor is None
    assert theirs.peer_ms == "OutOfMemoryError" and theirs.reached is None and theirs.ours_ms == 2.0
    assert theirs.extra == {"plain_ms": "OutOfMemoryError"}
    bench.case(LABEL, lambda _: fail())
    bench.add(LABEL, lambda: None, derive=lambda _: fail())
    assert bench.rows[2].ours_ms == "OutOfMemoryError" and bench.rows[3].extra == {"error": "OutOfMemoryError"}
    assert bench.errors[0] == "group what T=1: ours: OutOfMemoryError: no room"
    assert "no room" in capsys.readouterr().err


def test_goals() -> None:
    row = Row(*LABEL, ours_ms=1.0, extra={"share": 0.6, "name": "x"})
    assert Goal("share", 0.6, "", least=False).reached(row) and not Goal("share", 0.61, "").reached(row)
    assert Goal("name", 1.0, "").reached(row) is None and Goal("absent", 1.0, "").reached(row) is None
    assert ratio_goal(2.5).text == "2.5 x the peer's speed" and floor_goal(None) is None


def test_numbers_for_json() -> None:
    assert tidy({"a": (1.23456789, math.nan), 2: [math.inf, 3, None]}) == {"a": [1.23457, None], "2": [None, 3, None]}


@pytest.mark.parametrize(
    ("total", "low", "high"), [(8192, 64, 4096), (131072, 64, 4096), (32768, 64, 8192), (5, 64, 99)]
)
def test_documents_sum_to_the_row(total: int, low: int, high: int) -> None:
    lengths = inputs.documents(total, low, high)
    assert sum(lengths) == total and lengths == inputs.documents(total, low, high)
    assert all(low <= length <= high for length in lengths[:-1]) and 0 < lengths[-1] <= high
    cu = inputs.offsets(lengths, torch.device("cpu"))
    assert cu.dtype == torch.int32 and cu[-1] == total and cu.diff().tolist() == lengths


def test_slopes_are_the_released_models() -> None:
    slopes = inputs.slopes_of(64, 1.0, torch.device("cpu"))
    assert slopes[0].item() == pytest.approx(0.917004, rel=1e-6) and slopes[-1].item() == 0.00390625


def test_names_and_repetitions() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100",
             "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA GH200 480GB": "gh200"}  # fmt: skip
    assert {name: machine.short_name(name) for name in names} == names
    assert report.file_stem("2026-01-31", "h100") == "2026-01-31-h100"
    assert report.file_stem("2026-01-31", "h100", True, True) == "2026-01-31-h100-quick-partial"
    assert [machine.repetition_ms(ms, False) for ms in (0.1, 2, 40, 500)] == [200, 100, 280, 700]
    assert machine.repetition_ms(0.1, True) == 40 and machine.versions()["torch"] == torch.__version__


def test_lengths_within_the_limit() -> None:
    bench = Bench(torch.device("cpu"), 1.0, timer, timer, lambda function: function, limit=32768)
    assert bench.lengths((8192, 32768, 131072)) == [8192, 32768] and bench.lengths((65536, 131072)) == [32768]
    bench.limit = None
    assert bench.lengths((8192, 1 << 20)) == [8192, 1 << 20] and bench.cap(64) == 64


@pytest.mark.parametrize("capacity", [None, 6])
def test_the_plain_moe_does_what_ours_does(capacity: int | None) -> None:
    torch.manual_seed(0)
    logits, x = torch.randn(50, 8), torch.randn(50, 3)
    plan = route(logits, 2, capacity)
    weight, expert, slot, *_ = moe.plain_route(logits, 2, capacity)
    kept = plan.row_TK >= 0
    assert torch.equal(expert.int(), plan.expert_TK) and torch.equal(slot >= 0, kept)
    rows = moe.plain_rows(x, weight, *moe.kept_rows(plan))
    torch.testing.assert_close(rows, unpermute(permute(x, plan), weight, plan))
    assert plan.token_R[: kept.sum()].tolist() == moe.kept_rows(plan)[0].tolist()


def test_softmax_operations() -> None:
    assert softmax.operations([8192], False) == 4 * 8192**2 * 128 * 64 / 2
    assert softmax.tflops([32768], True, 118.7822) == pytest.approx(518.366, rel=1e-4)
    assert softmax.tflops([32768], True, "Error") is None


def test_worst_ratio() -> None:
    assert errors.worst_ratio({"o": 1.0, "dq": 3.0}, {"o": 2.0, "dq": 2.0}) == 1.5
    assert errors.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0]).double()) == 0.75


def test_report_renders_nulls_errors_and_bars() -> None:
    rows = [Row("lightning", "attention", "T=8", 1.5, "FLA", "OutOfMemoryError", 1.35, 0.9, None, "0.90 | x", True),
            Row("errors", "o", "T=9", extra={"ours": {"o": 0.001668}, "worst_ratio": None})]  # fmt: skip
    text = report.markdown(result_of(rows, fla_missing="ImportError: x", errors=["a: b"]))
    assert "| attention | T=8 | 1.5 | FLA | OutOfMemoryError | – | 1.35 | 0.9 | 0.90 / x | yes |  |" in text
    assert "| o | T=9 | – | – | – | – | – | – | – | – | ours (o 0.001668), worst ratio – |" in text
    assert "1 goals: 1 reached, 0 not reached, 0 not measured." in text and "- a: b" in text
    assert "could not be imported (ImportError: x)" in text and text.count("## ") == 3
    assert [report.number(value) for value in (True, False, 12345.6, 1e-5, 0.0, 3)] == [
        "yes", "no", "12346", "1.00e-05", "0", "3",
    ]  # fmt: skip


def test_files_and_plot(tmp_path: Path) -> None:
    rows = [Row("curve", "fb", "T=1024", 1.0, "FLA", 2.0, extra={"tokens": 1024, "softmax_ms": "Error"}),
            Row("curve", "fb", "T=2048", "Error", "FLA", None, extra={"tokens": 2048, "softmax_ms": 3.0}),
            Row("varlen", "packed", "T=8 D=128", 2.0, "FLA", 4.0, 1.0, 0.5),
            Row("lightning", "attention", "T=8", "Error", "FLA", None, 1.0)]  # fmt: skip
    result = result_of(rows)
    assert plot.curve_points(result["rows"], "ours_ms") == ([1024], [1.0])
    assert plot.curve_points(result["rows"], "softmax_ms") == ([2048], [3.0])
    assert plot.bars(result["rows"]) == [("packed, T=8", 0.5, 0.25), ("attention, T=8", 0.0, 0.0)]
    path = tmp_path / "new" / "2026-01-31-h100"
    report.write(result, path)
    assert json.loads((tmp_path / "new" / "2026-01-31-h100.json").read_text()) == result
    for name, shown in (("full", result), ("empty", result_of([]))):
        plot.draw(shown, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("group", run.GROUPS)
def test_every_group_runs(bench: Bench, group: str) -> None:
    run.GROUPS[group](bench)
    assert bench.rows and all(row.group == group for row in bench.rows)
    dense = {"softmax", "curve"}  # these also need kernels that the CPU lacks
    assert group in dense or not bench.errors
    report.markdown(result_of(bench.rows))
    json.dumps(result_of(bench.rows), allow_nan=False)


def test_the_run_goes_on_after_a_group_and_writes_files(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(run, "start", lambda args: (bench, result_of([], groups=args.only)))
    monkeypatch.setitem(run.GROUPS, "lightning", lambda _: fail())
    assert run.main(["--out", str(tmp_path), "--only", "decode,lightning"]) == 0
    path = tmp_path / "2026-01-31-h100-partial"
    result = json.loads(path.with_name(path.name + ".json").read_text())
    assert result["groups"] == ["lightning", "decode"] and {row["group"] for row in result["rows"]} == {"decode"}
    assert result["errors"] == ["lightning: OutOfMemoryError: no room"]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {path}.json, .md and .png"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 2
    assert capsys.readouterr().err == "error: this bench needs an NVIDIA GPU, and torch.cuda finds none here.\n"


def test_unknown_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["--only", "decode,nonsense"])
    assert "nonsense is not among lightning, few_heads" in capsys.readouterr().err


def test_help_of_the_script() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, SCRIPT, "--help"], env=env, capture_output=True, text=True, check=True)
    assert "--only" in done.stdout and "--quick" in done.stdout

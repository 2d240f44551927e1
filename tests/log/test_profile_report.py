"""The page of a profile: its lines, and hints that its figures call for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtrain.log.kernel_times import Gap, KernelTime, KindTime
from mmtrain.log.profile_hints import hints
from mmtrain.log.profile_report import ProfileReport, RankRow, gap_rows, kind_rows, report_lines
from mmtrain.log.timeline import draw_timeline

GEMM, NCCL = "void nvjet_tst<float, 3>", "ncclDevKernel_AllReduce"


def report(**changes: Any) -> ProfileReport:
    """A step of 100 ms on two GPUs, with nothing amiss."""
    kinds = {"matrix products": KindTime(0.12, 40), "norms": KindTime(0.04, 20), "optimizer": KindTime(0.01, 2)}
    ranks = [RankRow(rank, 100.0, 0.95, 0.1, 2.0, 40.0) for rank in range(2)]
    made = ProfileReport(
        header=["run     mine: initial weights"], versions={"torch": "2.11", "CUDA": "13.0"}, steps=2, timed=5,
        tokens=8192, step_s=0.1, mfu=0.4, busy=0.95, rate_tflops=700.0,
        kinds=kind_rows(kinds, 2, 0.1, {"matrix products": 3e13}, 7e14), exposed_ms=2.0, idle_ms=5.0,
        gaps=gap_rows([Gap(0.001, GEMM, NCCL)]), ranks=ranks, device_gib=140.0,
        memory_gib={"parameters": 1.0, "the rest": 39.0, "peak allocated": 40.0, "peak reserved": 100.0},
    )  # fmt: skip
    return replace(made, **changes)


def reading(ms: float) -> list[RankRow]:
    return [RankRow(0, 100.0, 0.95, 0.1, 2.0, 40.0), RankRow(1, 100.0, 0.95, ms, 2.0, 40.0)]


def test_rows_are_of_one_step() -> None:
    products, norms, _ = report().kinds
    assert (products.ms, products.share, products.launches) == pytest.approx((60.0, 0.6, 20))
    assert products.tflops == pytest.approx(3e13 / 0.06 / 1e12)
    assert products.floor_ms == pytest.approx(3e13 / 7e14 * 1e3)
    assert norms.tflops is None and norms.floor_ms is None  # no floor is made up


def test_the_page() -> None:
    text = "\n".join(report_lines(report(), ["larger x"], ["out/trace.json: for y"]))
    for part in ("with    torch 2.11, CUDA 13.0", "100.0 ms, median of 5", "busy in 95.0%", "MFU 40.0%", "tokens/s",
                 "exposed communication that no computing hides: 2.00 ms a step, 2.0%", "idle    5.00 ms",
                 "1.000 ms  nvjet_tst -> ncclDevKernel_AllReduce", "GiB of 140: parameters 1, the rest 39",
                 "try     larger x", "file    out/trace.json: for y"):  # fmt: skip
        assert part in text
    row = next(line for line in text.splitlines() if line.startswith("matrix products"))
    assert row.split()[2:] == ["60.00", "60.0%", "20", "500", "42.86"]
    assert text.count("95.0%") == 3  # of the step, and of each rank
    alone = report(ranks=report().ranks[:1], busy=None, idle_ms=None, exposed_ms=None)
    text = "\n".join(report_lines(alone, [], []))
    assert "rank" not in text and "busy" not in text and "idle" not in text and "nothing stands out" in text


def test_programs_read_the_same_figures() -> None:
    record = json.loads(json.dumps(report().as_record(["a"], ["b"])))
    assert record["hints"] == ["a"] and record["files"] == ["b"] and record["tokens_per_s"] == 81920
    assert record["kinds"][0]["kind"] == "matrix products" and record["ranks"][1]["rank"] == 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, []),
        ({"busy": 0.8}, ["idles in 20% of the step", "parallel.micro_batch_rows"]),
        ({"busy": 0.8, "graphs_possible": True}, ["or parallel.cuda_graphs=auto"]),
        ({"exposed_ms": 15.0}, ["waits for communication in 15%", "parallel.tp"]),
        ({"ranks": reading(8.0)}, ["waits for its rows in 8%", "data.num_workers"]),
        ({"ranks": reading(20.0), "busy": 0.75}, ["data.num_workers"]),  # which is why it idles
        ({"kinds": kind_rows({"optimizer": KindTime(0.03, 1)}, 2, 0.1, {}, 1.0), "phase": 1},
         ["the optimizer takes 15%", "stage.phases.1.batch.0.tokens"]),
        ({"recomputes": True}, []),
        ({"recomputes": True, "memory_gib": {"peak reserved": 60.0}}, ["80 GiB are free", "activation_checkpoint"]),
        ({"busy": None, "exposed_ms": None}, []),
    ],
)  # fmt: skip
def test_hints_follow_the_figures(changes: dict[str, Any], parts: list[str]) -> None:
    found = hints(report(**changes))
    assert len(found) == (1 if parts else 0) and all(part in found[0] for part in parts)


def test_three_hints_at_most_the_costliest_first() -> None:
    found = hints(report(busy=0.5, exposed_ms=30.0, ranks=reading(6.0), recomputes=True,
                         memory_gib={"peak reserved": 1.0}))  # fmt: skip
    assert [hint.split(" in ")[0] for hint in found] == [
        "the device idles", "computing waits for communication", "a rank waits for its rows",
    ]  # fmt: skip


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    runs = [KernelTime(GEMM, 0, 2_000_000, 7), KernelTime(NCCL, 1_000_000, 3_000_000, 20)]
    path = draw_timeline(runs, tmp_path / "new" / "timeline.png", "two streams")
    assert path.read_bytes().startswith(b"\x89PNG")

"""What a page holds is what the runs recorded: figures, spikes, each step once, and what went wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtrain.report.curves import BUCKETS, FINE_BUCKETS
from mmtrain.report.encode import unpacked
from mmtrain.report.payload import run_payload
from mmtrain.report.read_run import read_run
from tests.report.made import make_run, write_lines


def payload(folder: Path) -> dict[str, Any]:
    return run_payload(read_run(folder))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if "loss" in record]


def curve(made: dict[str, Any], name: str, part: str = "mean", level: int = 0) -> np.ndarray:
    return unpacked(made["curves"]["levels"][level]["figures"][name][part])


def test_curves_are_the_metrics_at_their_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    made, steps = payload(run), steps_of(run)
    (level,) = made["curves"]["levels"]
    assert unpacked(level["step"]).tolist() == list(range(1, 61))
    assert unpacked(level["tokens"]).tolist() == [record["tokens"] for record in steps]
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "drop_rate", "memory_gib"):
        assert curve(made, name) == pytest.approx([record[name] for record in steps], rel=1e-6), name
    assert curve(made, "batch_tokens").tolist() == [524_288] * 60
    hours = unpacked(level["hours"])
    assert hours[0] == pytest.approx(steps[0]["step_s"] / 3600) and np.diff(hours) == pytest.approx(
        0.8 / 3600, rel=1e-2
    )
    assert made["curves"]["last"]["loss"] == steps[-1]["loss"]


def test_a_dense_run_has_no_curves_of_experts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    metrics = [{**record, "router_load": [], "drop_rate": 0.0, "aux_loss": 0.0} for record in records(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    assert not {"drop_rate", "aux_loss"} & payload(run)["curves"]["levels"][0]["figures"].keys()
    assert "drop_rate" in payload(make_run(tmp_path / "experts"))["curves"]["levels"][0]["figures"]


def test_the_summary_is_that_of_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    made, steps = payload(run)["summary"], steps_of(run)
    valid = [record for record in records(run) if "val_loss" in record]
    assert (made["step"], made["tokens"], made["last_step"]) == (60, 60 * 524_288, 60)
    assert (made["loss"], made["first_loss"]) == (steps[-1]["loss"], steps[0]["loss"])
    assert (made["val_loss"], made["val_bits_per_byte"]) == (valid[-1]["val_loss"], valid[-1]["val_bits_per_byte"])
    assert made["tokens_per_s"] == sorted(record["tokens_per_s"] for record in steps)[30]
    assert made["mfu"] == sorted(record["mfu"] for record in steps)[30]
    assert made["memory_gib"] == max(record["memory_gib"] for record in steps)
    assert (made["model"], made["parameters"], made["skipped"]) == ("hybrid_7b", 7_200_000_000, 0)


def test_a_step_that_was_recorded_again_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    again = [{**record, "loss": 99.0} for record in steps_of(run) if record["step"] in (40, 41)]
    write_lines(run / "metrics.jsonl", [*records(run), *again])
    made = payload(run)
    assert unpacked(made["curves"]["levels"][0]["step"]).tolist() == list(range(1, 61))
    losses = curve(made, "loss")
    assert losses[39] == losses[40] == 99.0 and losses[41] < 10
    assert any("2 records of steps that were recorded again" in one["text"] for one in made["troubles"])


def test_a_hundred_thousand_steps_are_thinned_out_and_no_spike_is_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=20)
    one = {key: value for key, value in steps_of(run)[0].items() if key in ("loss", "tokens", "step_s", "time")}
    lines = [{**one, "step": step, "tokens": step, "loss": 2.0 + step / 1e6} for step in range(1, 100_001)]
    lines[54_320]["loss"], lines[77_000]["loss"], lines[12]["loss"] = 50.0, 0.5, None
    write_lines(run / "metrics.jsonl", lines)
    made = payload(run)
    coarse, fine = made["curves"]["levels"]
    assert (coarse["size"], fine["size"]) == (100, 10)
    assert len(unpacked(coarse["step"])) == BUCKETS and len(unpacked(fine["step"])) == FINE_BUCKETS
    low, mean, high = (curve(made, "loss", part) for part in ("low", "mean", "high"))
    assert high.max() == 50.0 and high.argmax() == 543 and low.min() == 0.5 and low.argmin() == 770
    assert mean[100] == pytest.approx(np.mean([line["loss"] for line in lines[10_000:10_100]]), rel=1e-6)
    assert np.isfinite(mean).all() and unpacked(coarse["step"])[-1] == 100_000
    assert len(json.dumps(made)) < 1_500_000


def test_the_last_bucket_may_be_short(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=20)
    one = steps_of(run)[0]
    write_lines(
        run / "metrics.jsonl", [{**one, "step": step, "tokens": step, "loss": float(step)} for step in range(1, 1502)]
    )
    made = payload(run)
    assert unpacked(made["curves"]["levels"][0]["step"])[-2:].tolist() == [1500, 1501]
    assert curve(made, "loss", "low")[-1] == curve(made, "loss", "mean")[-1] == curve(made, "loss", "high")[-1] == 1501


def test_what_went_wrong_comes_first_and_worst_first(tmp_path: Path) -> None:
    made = payload(make_run(tmp_path / "r", eventful=True))
    levels = [one["level"] for one in made["troubles"]]
    assert levels == sorted(levels, key=["bad", "care", "note"].index) and set(levels) == {"bad", "care", "note"}
    text = "\n".join(one["text"] for one in made["troubles"])
    for part in (
        "rolled back from step 35 to 31, 64 rows left out",
        "2 steps skipped, weights left alone (1 spike, 1 not finite): 15, 30",
        "from step 0 on, has no end on record: it was killed",
        "rank 3 (node-1) is slow",
        "1 restart, after step 20",
        "1 more skipped step undone by a rollback",
    ):
        assert part in text
    marks = {(mark["kind"], mark["at"][0]) for mark in made["marks"]}
    assert marks == {("skipped", 15.0), ("skipped", 30.0), ("restart", 20.0), ("rollback", 31.0)}
    assert np.isnan(curve(made, "loss")[14])
    kinds = [(row["kind"], row["step"], bool(row.get("undone"))) for row in made["ledger"]]
    assert kinds == [("not finite", 15, False), ("spike", 30, False), ("spike", 33, True), ("rollback", 35, False)]
    assert payload(make_run(tmp_path / "calm"))["troubles"] == []


def test_a_stopped_launch_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    write_lines(
        run / "launches.jsonl",
        [
            {"event": "began", "step": 0, "time": None, "processes": 2},
            {"event": "ended", "step": 60, "why": "stopped by SIGTERM after step 60"},
        ],
    )
    assert "ended at step 60: stopped by SIGTERM" in payload(run)["troubles"][0]["text"]
    (run / "launches.jsonl").unlink()
    assert payload(run)["launches"] == [] == payload(run)["troubles"]


def test_experts_and_the_ranks_that_hold_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    made, steps = payload(run), steps_of(run)
    shape, load = made["experts"]["shape"], unpacked(made["experts"]["load"])
    assert shape == [60, 4, 8]
    table = np.array([record["router_load"] for record in steps])
    assert load.reshape(shape) / 1000 == pytest.approx(table, abs=6e-4)
    ranks = table.reshape(60, 4, 4, 2).sum(-1)
    worst = (ranks.max(-1) / ranks.mean(-1)).max(-1)
    assert unpacked(made["points"]["rank_load"]["value"]) == pytest.approx(worst, rel=1e-6)
    assert unpacked(made["points"]["pace_product_s/most"]["value"])[0] == pytest.approx(0.0013, rel=1e-4)


def test_phases_needles_and_options(tmp_path: Path) -> None:
    made = payload(make_run(tmp_path / "r"))
    assert [(row["name"], row["first_step"], row["last_step"], row["tokens"]) for row in made["phases"]] == [
        ("8k", 1, 20, 20 * 524_288),
        ("32k", 21, 40, 20 * 524_288),
        ("128k", 41, 60, 20 * 524_288),
    ]
    assert [one["step"] for one in made["needles"]] == [20, 40, 60]
    assert made["needles"][-1]["cells"][0] == ["single", 4096, 0.0, 100.0, 1.0]
    assert made["options"]["model.name"] == "hybrid_7b" and made["options"]["parallel.ep"] == "4"


@pytest.mark.parametrize("missing", ["config.json", "launches.jsonl", "experts", "time", "everything"])
def test_missing_pieces_leave_the_rest(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "r", eventful=True)
    drop = {"experts": ("router_load", "router_entropy", "drop_rate_per_layer"), "time": ("time",)}.get(missing, ())
    write_lines(
        run / "metrics.jsonl", [{key: value for key, value in one.items() if key not in drop} for one in records(run)]
    )
    if missing == "everything":
        write_lines(run / "metrics.jsonl", [{"step": 1, "tokens": 8, "loss": 3.0}])
    for name in ("config.json", "launches.jsonl", "ledger.jsonl", "log.txt"):
        if missing in (name, "everything"):
            (run / name).unlink()
    made = payload(run)
    assert made["summary"]["loss"] is not None and len(unpacked(made["curves"]["levels"][0]["step"])) in (1, 60)
    assert (made["experts"] is None) == (missing in ("experts", "everything"))


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "tokens": 1, "lo\n[1]\n{"step": "x", "loss": 1}\n{"step": 62, "tokens": 5, "loss": 4')
    found = read_run(run)
    assert found.damaged == {"metrics.jsonl": 4} and len(found.steps) == 60

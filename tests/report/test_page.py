"""The command and its file: one page that needs nothing else, in which texts stay texts; and input that cannot work."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from launch import report
from tests.report.made import NASTY, make_run, make_sweep, write_lines


def data_of(page: Path) -> dict[str, Any]:
    """The data inside a page, as a browser finds it: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that refuses a command line."""
    assert report.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_one_file_that_fetches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r")
    assert report.main([str(run)]) == 0
    page = run / "report.html"
    assert (
        capsys.readouterr().out
        == f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser, needs no network: xdg-open {page}\n"
    )
    text = page.read_text()
    assert "default-src 'none'" in text and not re.search(
        r"""(src|href)=["']?(?!data:,)[a-z/]|@import|url\(|fetch\(|XMLHttp""", text
    )
    assert data_of(page)["runs"][0]["name"] == "r" and not list(run.glob("*report*.tmp"))


def test_several_runs_and_a_sweep_in_the_order_given(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=i) for i, name in enumerate(("b", "a"))]
    again, sweep = make_run(tmp_path / "other/a"), make_sweep(tmp_path / "s")
    out = tmp_path / "page.html"
    assert report.main([*map(str, (*runs, again, sweep)), "--out", str(out)]) == 0
    made = data_of(out)
    assert [run["name"] for run in made["runs"]] == ["b", str(runs[1]), str(again)]
    found = made["sweeps"][0]
    assert len(found["points"]) == 90 and found["points"][0]["architecture"] == "softmax"
    law = found["laws"][0]
    assert (law["label"], law["beta"], law["alpha"]) == ("softmax", 2.9, -0.061)
    assert ["note", NASTY] in found["fit"]
    assert found["notes"][:2] == [["softmax", "doubtful", NASTY], ["softmax", "not fitted", "too few sizes"]]


def test_a_sweep_without_a_fit_and_with_damaged_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path / "s", fitted=False)
    with (sweep / "points.jsonl").open("a") as file:
        file.write('{"architecture": "x", "loss": 1}\n{"loss": 2, "flops": -1}\n{"lo')
    assert report.main([str(sweep)]) == 0
    found = data_of(sweep / "report.html")["sweeps"][0]
    assert (len(found["points"]), found["damaged"], found["laws"], found["fit"]) == (90, 3, [], [])
    assert found["notes"] == []
    capsys.readouterr()
    (sweep / "points.jsonl").write_text("")
    assert "points.jsonl holds no point with a loss" in refused(capsys, sweep)


def test_texts_cannot_leave_the_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    (run / "config.json").write_text(json.dumps({"run": {"name": NASTY}, "model": {"name": NASTY}, NASTY: "&amp;"}))
    (run / "log.txt").write_text(f"2026-01-05 09:00:00 {NASTY} <!--\n")
    out = tmp_path / "x & <b>.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    text, made = out.read_text(), data_of(out)["runs"][0]
    assert text.count("</script") == 2 and "<img" not in text and "<!--" not in text
    assert made["options"]["model.name"] == NASTY and made["log"][0][1] == f"{NASTY} <!--"


def test_a_name_in_the_title_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<i>&r")
    assert report.main([str(run)]) == 0
    assert "<title>&lt;i&gt;&amp;r · mmtrain report</title>" in (run / "report.html").read_text()


def test_input_that_cannot_work_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty, young = make_run(tmp_path / "r"), tmp_path / "empty", tmp_path / "young"
    empty.mkdir()
    young.mkdir()
    assert "no such folder; give the folder of a run, runs/NAME" in refused(capsys, tmp_path / "none")
    assert "is no run's folder: it has no metrics.jsonl" in refused(capsys, empty)
    (young / "config.json").write_text("{}")
    assert "has no metrics.jsonl yet; wait for its first step" in refused(capsys, young)
    write_lines(young / "metrics.jsonl", [])
    assert "records no step" in refused(capsys, young)
    assert "is given twice" in refused(capsys, run, tmp_path / "empty/../r")
    assert "is a folder; give a file" in refused(capsys, run, "--out", tmp_path)
    assert "there is no folder" in refused(capsys, run, "--out", tmp_path / "none/x.html")
    assert "are more runs than one page tells apart" in refused(capsys, *(tmp_path / str(i) for i in range(17)))
    assert not list(tmp_path.rglob("*.html"))


def test_a_full_disk_leaves_the_old_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "r")
    (run / "report.html").write_text("old")

    def full(scratch: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28), str(target))

    monkeypatch.setattr(os, "replace", full)
    assert "cannot be written: No space left on device" in refused(capsys, run)
    assert (run / "report.html").read_text() == "old" and not list(run.glob("*report*.tmp"))


def test_damaged_lines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().err == f"note: {run / 'metrics.jsonl'}: 1 damaged line left out\n"
    assert (
        "1 line of metrics.jsonl is no record: left out"
        in data_of(run / "report.html")["runs"][0]["troubles"][0]["text"]
    )

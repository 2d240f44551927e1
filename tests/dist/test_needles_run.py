"""A run with needles: its records, its heat map, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.runs import SMALL, pretrain, records, steps

NEEDLES = ["stage.phases.0.seq_len=320", "stage.phases.0.batch.0.tokens=1280", "evals.needles.enabled=true",
           "evals.needles.kinds=[single,multi_key]", "evals.needles.depths=[0,1]", "evals.needles.samples=1",
           "evals.max_share=0.5"]  # fmt: skip


@pytest.mark.slow
def test_needles_are_scored_at_the_end_of_a_phase_under_the_layout(corpus: Path, tmp_path: Path) -> None:
    given = [
        *SMALL,
        *NEEDLES,
        "evals.needles.lengths=[318]",
        f"data.path={corpus}",
        f"run.dir={tmp_path}",
        "run.name=a",
    ]
    done = pretrain(*given, "parallel.tp=2", "log.plot=true", processes=2)
    found = [record for record in records(tmp_path / "a") if "needles" in record]
    (record,) = found
    assert record["step"] == steps(tmp_path / "a")[-1]["step"] and record["phase"] == "quickstart"
    assert record["needles"] == record["needles/single"] == record["needles/multi_key/318"] == 0.0
    assert [(cell["kind"], cell["depth"]) for cell in record["needle_cells"]] == [
        ("single", 0.0), ("single", 1.0), ("multi_key", 0.0), ("multi_key", 1.0)
    ]  # fmt: skip
    assert all(0 < cell["nats"] < 20 and cell["repeats"] == 1 for cell in record["needle_cells"])
    assert (tmp_path / "a" / "needles.png").read_bytes()[1:4] == b"PNG"
    log = (tmp_path / "a" / "log.txt").read_text()
    assert log.count("needles 0.0% (single 0.0, multi_key 0.0) at 318 tokens") == 1 and "needles in phase" in log
    assert done.returncode == 0


def test_lengths_that_hold_no_needle_are_refused_before_the_run_s_folder(corpus: Path, tmp_path: Path) -> None:
    given = [
        *SMALL,
        *NEEDLES,
        "evals.needles.lengths=[100]",
        f"data.path={corpus}",
        f"run.dir={tmp_path}",
        "run.name=a",
    ]
    done = pretrain(*given, processes=None, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: evals.needles.lengths[0]=100: needles, question and answer")
    assert not (tmp_path / "a").exists()

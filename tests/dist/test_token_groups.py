"""Groups of experts in whole runs: the number is measured where asked for, and what communication cost is logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.runs import SMALL, pretrain, steps


@pytest.fixture(scope="module")
def tuned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tuned")
    options = ["parallel.ep=2", "parallel.token_groups=auto", "run.max_steps=2"]
    done = pretrain(*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=auto", *options, processes=2)
    return folder / "auto", done.stderr


@pytest.mark.slow
def test_auto_says_what_it_measured_and_took(tuned: tuple[Path, str]) -> None:
    line = next(line for line in tuned[1].splitlines() if line.startswith("token_groups=auto took "))
    assert line.split()[2] in ("1", "2") and "1: " in line and ", 2: " in line


@pytest.mark.slow
def test_a_run_says_how_rows_are_exchanged(tuned: tuple[Path, str]) -> None:
    lines = tuned[1].splitlines()
    groups = next(line.split()[2] for line in lines if line.startswith("token_groups=auto took "))  # as measured
    reason = {"1": "there is no GPU", "2": "token_groups=2"}[groups]
    assert f"exchange=auto took collectives: {reason}" in lines


@pytest.mark.slow
def test_every_step_says_how_much_communication_was_hidden(tuned: tuple[Path, str]) -> None:
    for row in steps(tuned[0]):
        assert row["exchange_s"] > 0 and row["exchange_hidden"] == 0.0  # a CPU hides nothing


@pytest.mark.slow
def test_without_expert_parallelism_there_is_nothing_to_say(corpus: Path, tmp_path: Path) -> None:
    pretrain(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=one", "parallel.token_groups=auto",
             "run.max_steps=1", processes=None)  # fmt: skip
    assert all("exchange_s" not in row for row in steps(tmp_path / "one"))

"""Cases of the context bench's part step, as its command line takes and refuses them."""

from __future__ import annotations

import argparse

import pytest

from mmtrain.bench.context_cases import StepCase, step_cases
from mmtrain.bench.context_gpu import read_options
from mmtrain.bench.context_rows import mixture


def read(*arguments: str) -> list[StepCase]:
    return read_options(["--out", "folder", *arguments]).step_cases


def test_cases_are_read() -> None:
    expected = [StepCase(131072, 2, True), StepCase(1048576, 1, False), StepCase(1048576, 0, False)]
    assert read("--step-cases", "131072:2:1,1048576:1:0,1048576:0:0") == expected
    assert read() == [StepCase(131072, 3, True), StepCase(262144, 3, True)]
    crossed = read("--step-tokens", "64,32", "--step-rows", "1,2", "--step-warm", "0,1")
    assert crossed == [StepCase(64, 1, False), StepCase(64, 2, True), StepCase(32, 1, False), StepCase(32, 2, True)]
    assert read("--smoke") == [StepCase(128, 3, True)]
    assert read("--smoke", "--step-cases", "64:0:0") == [StepCase(64, 0, False)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("128", "'128' is not TOKENS:ROWS:WARM"),
        ("128:1:1,", "'' is not TOKENS:ROWS:WARM"),
        ("128:-1:1", "'128:-1:1' is not TOKENS:ROWS:WARM"),
        ("128:1:yes", "three whole numbers: give for example 131072:2:1"),
        ("0:1:1", "a row of 0 tokens has no document"),
        ("128:1:2", "WARM is 2: give 1 for the same steps before, or 0"),
    ],
)
def test_what_is_no_case_is_refused(text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        step_cases(text)
    with pytest.raises(SystemExit) as error:
        read(f"--step-cases={text}")
    assert error.value.code == 2
    found = capsys.readouterr().err
    assert "argument --step-cases" in found and told in found


def test_options_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (("--step-cases", "128:1:1", "--step-rows", "2"), "stands in place of --step-rows"),
        (("--step-rows", "1,2"), "--step-rows has 2 numbers and --step-warm 1: give as many of both"),
    ):
        with pytest.raises(SystemExit):
            read(*arguments)
        assert told in capsys.readouterr().err


def test_documents_of_a_case() -> None:
    assert StepCase(1000, 0).documents(first=7) == [(1000,)]
    assert StepCase(2**18, 2).documents(first=3) == [mixture(2**18, "128K", seed) for seed in (3, 4)]
    assert StepCase(2**19, 1).documents() == [mixture(2**19, "1M", 0)]

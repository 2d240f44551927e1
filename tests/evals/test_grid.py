"""Grids of phases: lengths that rows hold, those that are refused, and what the header says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdata.corpus.split import Split
from mmtrain.config import PhaseConfig
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.evals.needles import NeedleEvaluation, needle_evaluation
from tests.evals.text import TOKENIZER, split

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def evaluation(held: Split | None, *overrides: str, seq_lens: tuple[int, ...] = (1024, 4096)) -> NeedleEvaluation:
    given = ["stage=quickstart", "run.name=x", "data.path=corpus", "model.vocab_size=257"]
    config = compose([*given, "evals.needles.enabled=true", *overrides], CONFIGS)
    phases = [PhaseConfig(f"p{n}", Count(n), 1e4, Count(1), [], []) for n in seq_lens]
    units = [config.parallel.tp] * len(phases)
    made = needle_evaluation(config, phases, units, held, TOKENIZER, "corpus")
    assert made is not None
    made.lines = made.header_lines(phases)
    return made


@pytest.fixture
def held(tmp_path: Path) -> Split:
    return split(tmp_path)


def test_nothing_is_asked_of_the_data_where_needles_are_off() -> None:
    config = compose(["stage=quickstart", "run.name=x", "data.path=corpus"], CONFIGS)
    assert needle_evaluation(config, [], [], None, TOKENIZER, "corpus") is None


def test_lengths_are_parts_of_each_phase_s_rows_that_hold_all_kinds(held: Split) -> None:
    made = evaluation(held, "evals.needles.every=100")
    assert [grid.lengths for grid in made._grids] == [(512, 1024), (512, 1024, 2048, 4096)]  # multi takes 450 bytes
    single = evaluation(held, "evals.needles.kinds=[single]", "parallel.tp=3", seq_lens=(1024,))
    assert single._grids[0].lengths == (255, 510, 1023)
    assert made.lines[1] == ("needles in phase p4096: single, multi, multi_key, variable_tracking at 512 to 4,096 "
                             "tokens, 5 depths x 4 samples, every 100 steps and at its end")  # fmt: skip


def test_lengths_that_rows_do_not_hold_are_left_out(held: Split) -> None:
    made = evaluation(held, "evals.needles.lengths=[2048,1000,8192]", "evals.needles.kinds=[single]")
    assert [grid.lengths for grid in made._grids] == [(1000,), (1000, 2048)]
    assert made.lines[0].endswith("at its end; its rows of 1,024 tokens do not hold 2,048, 8,192")
    short = evaluation(held, "evals.needles.lengths=[2048]")
    assert short._grids[0] is None and short.lines[0].startswith("needles in phase p1024: none; its rows")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evals.needles.lengths=[4096,100]"],
         r"lengths\[1\]=100: needles, question and answer of kind single take 1\d\d tokens; give 1\d\d or more"),
        (["evals.needles.lengths=[400]"], r"lengths\[0\]=400: .* of kind multi take 4\d\d tokens"),
        (["evals.needles.lengths=[8192]"], r"lengths=\[8192\]: no phase's rows hold one: the longest have 4096 tokens"),
        (["evals.needles.lengths=[2047]", "parallel.tp=2"], r"lengths\[0\]=2047: is no multiple of 2 .* give 2046"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_are_refused(held: Split, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        evaluation(held, *overrides)
    assert "\n" not in str(caught.value)


def test_a_corpus_without_held_out_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evals\.needles\.enabled=true: corpus has no held-out part") as caught:
        evaluation(None)
    assert "\n" not in str(caught.value)

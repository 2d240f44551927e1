"""Scores of choices and translations against figures worked out by hand, and against sacrebleu's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmtrain.evals.files.choices import Question, choice_rows, encode_pair, score_choices
from mmtrain.evals.files.chrf import chrf
from tests.evals.text import TOKENIZER


def test_choices_by_sum_by_byte_and_the_log_of_the_normalised_probability() -> None:
    log_probs = np.array([-2.0, -3.0, -4.0])  # by byte of "ab", "abcdef", "xy": -1, -1/2, -2
    found = score_choices(log_probs, (" ab", " abcdef", "xy"), 1)
    assert (found.acc, found.acc_norm) == (False, True)
    assert found.log_acc_norm2 == pytest.approx(-0.5 - math.log(math.exp(-1) + math.exp(-0.5) + math.exp(-2)))
    assert score_choices(log_probs, (" ab", " abcdef", "xy"), 0)[:2] == (True, False)
    even = score_choices(np.array([-1.0, -1.0]), ("a", "b"), 1)
    assert even.log_acc_norm2 == pytest.approx(math.log(0.5)) and not even.acc  # of equal ones the first is taken


def test_bytes_count_not_characters_nor_the_space_before() -> None:
    found = score_choices(np.array([-2.0, -2.0]), (" é", " e"), 0)  # by byte -1 and -2
    assert found.acc_norm and found.log_acc_norm2 == pytest.approx(-1 - math.log(math.exp(-1) + math.exp(-2)))


def test_a_choice_is_what_follows_its_context() -> None:
    assert encode_pair(TOKENIZER, "ab ", "c") == ([97, 98], [32, 99])
    assert encode_pair(TOKENIZER, "", "c") == ([TOKENIZER.eod_id], [99])
    (one, two) = choice_rows(TOKENIZER, Question("n", "ab", (" c", " de"), 0))
    assert one[0].tolist() == [97, 98, 32, 99] and (one[1], two[1]) == (2, 3)


@pytest.mark.parametrize(
    ("texts", "references", "score"),  # of sacrebleu 2.6.0, CHRF().corpus_score
    [
        (["the cat sat"], ["the cat sat on the mat"], 49.59348409966008),
        (["abc", "kitten on a mat"], ["abd", "kitten mat"], 54.080001453142714),
        (["Mu toni me", "ab"], ["Mu toni wa me", "abcdefgh"], 34.58765464522402),
        (["a long hypothesis here"], ["ab"], 9.25925925925926),
        (["x"], ["hello"], 0.0),
        ([""], ["hello"], 0.0),
        (["Bal me"], ["Bal me"], 100.0),
    ],
)
def test_chrf_is_sacrebleu_s(texts: list[str], references: list[str], score: float) -> None:
    assert chrf(texts, references) == pytest.approx(score, abs=1e-9)

"""Scores of choices and translations against figures worked out by hand, and against sacrebleu's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmtrain.errors import ConfigError
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
    (one, two) = choice_rows(TOKENIZER, Question("n", "ab ", ("c", "de"), 0))
    assert one[0].tolist() == [97, 98, 32, 99] and (one[1], two[1]) == (2, 3)
    (one, two) = choice_rows(TOKENIZER, Question("n", " ", ("c", "de"), 0))
    assert one[0].tolist() == [TOKENIZER.eod_id, 32, 99] and (one[1], two[1]) == (2, 3)


class Joining:
    """A tokenizer of bytes that joins some pairs, as byte-pair encodings do."""

    eod_id = 256
    pairs = {"(A": 300, "(B": 301, "q ": 302}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            joined = self.pairs.get(text[:2])
            ids.append(ord(text[0]) if joined is None else joined)
            text = text[1 if joined is None else 2 :]
        return ids


def test_choices_that_join_the_end_of_their_context_are_scored_from_the_same_place() -> None:
    rows = choice_rows(Joining(), Question("n", "x(", ("A", "B", "C"), 0))
    assert [(row.tolist(), scored) for row, scored in rows] == [
        ([120, 300], 1), ([120, 301], 1), ([120, 40, 67], 2)
    ]  # fmt: skip
    rows = choice_rows(Joining(), Question("n", "q", (" a", "b"), 0))  # no token is left of the context
    assert [(row.tolist(), scored) for row, scored in rows] == [([256, 302, 97], 2), ([256, 113, 98], 2)]


def test_a_choice_without_a_token_is_refused() -> None:
    class Deaf(Joining):
        pairs = {}  # noqa: RUF012

        def encode(self, text: str) -> list[int]:
            return super().encode(text.replace("b", ""))

    with pytest.raises(ConfigError, match="'b' of line 3: the tokenizer makes no token of it"):
        choice_rows(Deaf(), Question("line 3", "q", ("a", "b"), 0))


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

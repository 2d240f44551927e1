"""Exact match and ANLS beside plain references."""

from __future__ import annotations

import random

import pytest

from mmtrain.evals.files.answers import anls, edit_distance, exact_match, normalise


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" The  Red,\tsquare. ", "red square"),
        ("an apple; a pear", "apple pear"),
        ("theatre", "theatre"),
        ("3.5 and 1,000.", "3.5 and 1,000"),
        ("U.S.A.", "usa"),
        ("The.", "the"),
        (" ?! ", "?!"),
        ("", ""),
    ],
)
def test_answers_are_normalised(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


def test_any_right_answer_will_do() -> None:
    assert exact_match("The RED one!", ["blue", "red one"]) and not exact_match("red", ["blue", "red one"])
    assert not exact_match("35", ["3.5"])
    assert exact_match("A.", ["a"])
    assert not any(exact_match(answer, ["A"]) for answer in ("", "The", "an", "?", "B"))  # the letter of a choice


def plain_distance(one: str, other: str) -> int:
    """By its definition, recursively."""
    if not one or not other:
        return len(one) + len(other)
    return min(plain_distance(one[1:], other) + 1, plain_distance(one, other[1:]) + 1,
               plain_distance(one[1:], other[1:]) + (one[0] != other[0]))  # fmt: skip


def test_distance_is_that_of_its_definition() -> None:
    rng = random.Random(0)
    for _ in range(60):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert edit_distance(one, other) == plain_distance(one, other)


@pytest.mark.parametrize(
    ("answer", "references", "wanted"),
    [
        ("Hello", ["hello"], 1.0),
        ("  hello   world", ["hello world"], 1.0),
        ("helo", ["hello"], 0.8),
        ("ab", ["abcd"], 0.0),  # a distance of one half is wrong
        ("abc", ["abcde"], 0.6),
        ("abc", ["xyz", "abcd"], 0.75),
        ("", ["a"], 0.0),
        ("hello.", ["hello"], 1 - 1 / 6),
    ],
)
def test_anls_is_docvqas(answer: str, references: list[str], wanted: float) -> None:
    assert anls(answer, references) == pytest.approx(wanted)

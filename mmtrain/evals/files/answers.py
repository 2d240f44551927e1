"""Scores of short answers: exact match after the usual normalisation, and ANLS. Needs no torch."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
"""Normalised distance from which on an answer is simply wrong (DocVQA, Mathew et al. 2021, section 4)."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Return an answer as exact match compares it: SQuAD's way (Rajpurkar et al. 2016).

    Lower case; ASCII punctuation is deleted, then the words a, an and the; white space is one space between words, and
    none around. A number keeps its digits and loses its point: 3.5 and 35 would be one answer, so that a point or comma
    between two digits stays. What would leave nothing is not deleted: A, the letter of a choice, is not the answer
    The, nor none at all.
    """
    text = text.lower()
    kept = re.sub(r"(?<=\d)([.,])(?=\d)", lambda found: {".": "\0", ",": "\1"}[found[1]], text)
    kept = kept.translate(_PUNCTUATION).replace("\0", ".").replace("\1", ",")
    for left in (_ARTICLES.sub(" ", kept), kept, text):
        if words := left.split():
            return " ".join(words)
    return ""


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Tell whether an answer is one of the right ones after :func:`normalise`."""
    return normalise(answer) in {normalise(one) for one in references}


def anls(answer: str, references: Sequence[str]) -> float:
    """Return the average normalised Levenshtein similarity of one answer, 0 to 1 (Biten et al. 2019, equation 1).

    Against each right answer, 1 - d / (characters of the longer one), where d is their edit distance, and 0 where d /
    (characters of the longer one) is 0.5 or more; the best counts. Case and white space do not matter, as in DocVQA's
    own script; punctuation does.
    """
    found = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        wanted = " ".join(reference.lower().split())
        longer = max(len(found), len(wanted))
        far = edit_distance(found, wanted) / longer if longer else 0.0
        best = max(best, 1 - far if far < ANLS_THRESHOLD else 0.0)
    return best


def edit_distance(one: str, other: str) -> int:
    """Return the least number of characters to insert, delete or replace that makes one text the other."""
    before = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != wanted)))
        before = row
    return before[-1]

"""Questions with choices: scored by the log-probability of each choice after the question. Legend: C choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A question with choices.

    Attributes:
        name: of the question, for messages and records.
        context: all that comes before a choice.
        choices: texts that may follow, two at the least; a space at the beginning is not counted as theirs.
        answer: number of the right one.
        groups: names of parts of the data that it belongs to, such as "easy".
    """

    name: str
    context: str
    choices: tuple[str, ...]
    answer: int
    groups: tuple[str, ...] = ()


class ChoiceScore(NamedTuple):
    """Score of one question.

    Attributes:
        acc: whether the likeliest choice is right.
        acc_norm: whether the choice that is likeliest by byte is right.
        log_acc_norm2: log of the probability, normalised over the choices, of the right one by byte.
    """

    acc: bool
    acc_norm: bool
    log_acc_norm2: float


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what continues it, cut where the context alone would end.

    Spaces at the end of the context go to the continuation, as most tokenizers join them to the next word. An empty
    context is the end of the document before.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [tokenizer.eod_id], tokenizer.encode(continuation)
    whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    return whole[:before], whole[before:]


def choice_rows(tokenizer: Tokenizer, question: Question) -> list[tuple[np.ndarray, int]]:
    """Return a row for each choice, int64, and how many of its last tokens are scored.

    All are scored from the same place on: where the tokens of the context alone end, or before it, where a tokenizer
    joins the end of the context and the beginning of a choice. "(" and "A" are one token of some; cut behind the
    context's tokens, nothing of such a choice would be scored, and nothing is likelier than anything.

    Raises:
        ConfigError: the tokenizer makes no token of a choice.
    """
    context = question.context.rstrip()
    spaces, before = question.context[len(context) :], tokenizer.encode(context)
    rows = [tokenizer.encode(context + spaces + choice) for choice in question.choices]
    first = min(_alike(before, row) for row in rows)
    if not first:  # the first token of a row follows the end of the document before
        rows, first = [[tokenizer.eod_id, *row] for row in rows], 1
    for row, choice in zip(rows, question.choices, strict=True):
        if len(row) == first:
            raise ConfigError("choices", f"{choice!r} of {question.name}", "the tokenizer makes no token of it",
                              "mend it, or take it out")  # fmt: skip
    return [(np.array(row, dtype=np.int64), len(row) - first) for row in rows]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    least = min(len(one), len(other))
    return next((place for place in range(least) if one[place] != other[place]), least)


def score_choices(log_probs_C: np.ndarray, choices: Sequence[str], answer: int) -> ChoiceScore:
    """Score the choices by their log-probabilities.

    `log_acc_norm2` is MiniMax-01's measure of its data ablations (section 4.1): log-probabilities are divided by the
    bytes of their choice, and normalised over the choices by a softmax. Of equal choices the first is taken.

    Args:
        log_probs_C: in nats, float64.
        choices: their texts.
        answer: number of the right one.
    """
    by_byte_C = log_probs_C / [max(len(choice.strip().encode()), 1) for choice in choices]
    total = float(np.logaddexp.reduce(by_byte_C))
    return ChoiceScore(
        int(log_probs_C.argmax()) == answer, int(by_byte_C.argmax()) == answer, float(by_byte_C[answer]) - total
    )

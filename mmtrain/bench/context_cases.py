"""Cases of the part step of the context bench: rows of so many tokens, how many, and whether after the same before."""

from __future__ import annotations

import argparse
from itertools import product
from typing import NamedTuple

from mmtrain.bench.context_rows import mixture

STAGES = {2**20: "1M", 2**19: "512K", 0: "128K"}
"""Mixtures, by the tokens of a row from which on it has them."""
FORM = "TOKENS:ROWS:WARM"


class StepCase(NamedTuple):
    """Steps of rows of one length.

    Attributes:
        tokens: of a row.
        rows: with documents of their own, measured in turn; 0 is one row of a single document.
        warm: whether steps of the same rows go before.
    """

    tokens: int
    rows: int = 3
    warm: bool = True

    def documents(self, first: int = 0) -> list[tuple[int, ...]]:
        """Lengths of the documents of each row; the first row is number `first`, which draws them."""
        name = next(name for least, name in STAGES.items() if self.tokens >= least)
        return [mixture(self.tokens, name, first + row) for row in range(self.rows)] or [(self.tokens,)]


def step_cases(text: str) -> list[StepCase]:
    """Read cases between commas, such as ``131072:2:1,1048576:0:0``.

    Raises:
        ArgumentTypeError: one is not of this form, with what is wrong with it.
    """
    return [_step_case(part) for part in text.split(",")]


def _step_case(text: str) -> StepCase:
    fields = text.split(":")
    if len(fields) != 3 or not all(field.isascii() and field.isdigit() for field in fields):
        raise argparse.ArgumentTypeError(f"{text!r} is not {FORM}, three whole numbers: give for example 131072:2:1")
    tokens, rows, warm = map(int, fields)
    if tokens < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a row of {tokens} tokens has no document: give TOKENS of 1 or more"
        )
    if warm > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: WARM is {warm}: give 1 for the same steps before, or 0")
    return StepCase(tokens, rows, bool(warm))


def crossed(tokens: list[int], rows: list[int], warm: list[int]) -> list[StepCase]:
    """Return cases of each number of tokens with each number of rows, and its `warm`.

    Raises:
        ValueError: there are not as many of `warm` as of `rows`.
    """
    if len(rows) != len(warm):
        raise ValueError(f"--step-rows has {len(rows)} numbers and --step-warm {len(warm)}: give as many of both")
    return [
        StepCase(one, count, bool(before)) for one, (count, before) in product(tokens, zip(rows, warm, strict=True))
    ]

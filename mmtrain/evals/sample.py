"""Samples: needles in held-out text with question and answer, of an exact number of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.insert import insert
from mmtrain.evals.tasks import TASKS, Task
from mmtrain.model.loss import IGNORE


class Cell(NamedTuple):
    """A place of the grid.

    Attributes:
        kind: of the task, a name in `TASKS`.
        length: tokens of a sample.
        depth: where the needle lies, from 0 to 1.
    """

    kind: str
    length: int
    depth: float


@dataclass(frozen=True)
class Sample:
    """One sample of T tokens, a single document.

    Attributes:
        tokens_T: int64 [T], text with needles, question and answer.
        labels_T: int64 [T], the next token where it is of an answer, elsewhere -100 (IGNORE).
        needles: first token of each needle, in the order of the task.
        laps: how often its text reads the held-out text; above 1 it repeats.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray
    needles: tuple[int, ...]
    laps: float


class SampleBuilder:
    """Builder of samples, each a pure function of (seed, cell, index) and the corpus.

    Args:
        haystack: the text.
        tokenizer: of text and needles.
        seed: of the draws.

    Raises:
        ConfigError: the tokenizer cannot tell answers apart.
    """

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer, seed: int) -> None:
        self.haystack, self._tokenizer, self._seed = haystack, tokenizer, seed
        pairs = ((" 1234567", " 7654321"), (" ABCDE", " EDCBA"))
        if any(tokenizer.encode(one) == tokenizer.encode(other) for one, other in pairs):
            raise ConfigError("evals.needles.enabled", "true", "the tokenizer does not tell two numbers or names apart",
                              "give evals.needles.enabled=false")  # fmt: skip

    def build(self, cell: Cell, index: int) -> Sample:
        """Return a sample of exactly `cell.length` tokens.

        Raises:
            ValueError: needles, question and answer leave no token for the text (see :meth:`overhead`).
        """
        rng = self._generator(cell, index)
        task = TASKS[cell.kind](cell.depth, rng)
        needles = [(needle.depth, self._encode(needle.pieces)) for needle in task.needles]
        ending, answer = self._ending(task)
        room = cell.length - len(ending) - sum(len(ids) for _, ids in needles)
        if room < 1:
            raise ValueError(f"{cell}: {1 - room} tokens more are needed")
        tokens, places = insert(self.haystack.read(room, rng), needles, self.haystack.breaks)
        tokens_T = np.concatenate([tokens, ending])
        labels_T = np.full(cell.length, IGNORE, dtype=np.int64)
        asked = np.flatnonzero(answer) + len(tokens)
        labels_T[asked - 1] = tokens_T[asked]
        return Sample(tokens_T, labels_T, places, self.haystack.laps(room))

    def overhead(self, cell: Cell, index: int) -> int:
        """Return the tokens of a sample that are no text: needles, question and answer."""
        task = TASKS[cell.kind](cell.depth, self._generator(cell, index))
        pieces = [*(piece for needle in task.needles for piece in needle.pieces), *(text for text, _ in task.ending)]
        return len(self._encode(pieces))

    def _generator(self, cell: Cell, index: int) -> np.random.Generator:
        named = f"{self._seed}/{cell.kind}/{cell.length}/{float(cell.depth)!r}/{index}"
        return np.random.default_rng(list(hashlib.sha256(named.encode()).digest()))

    def _encode(self, pieces: Iterable[str]) -> np.ndarray:
        return np.array([i for piece in pieces for i in self._tokenizer.encode(piece)], dtype=np.int64)

    def _ending(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of question and answers, int64, and which of them are answers, bool."""
        encoded = [(self._encode([text]), is_answer) for text, is_answer in task.ending]
        flags = [np.full(len(ids), is_answer) for ids, is_answer in encoded]
        return np.concatenate([ids for ids, _ in encoded]), np.concatenate(flags)

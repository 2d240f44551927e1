"""A prompt of an exact number of tokens with its answers, and what tasks make it with. Legend: T tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack, sentence_ends
from mmtrain.evals.ruler.pieces import Pieces

BATCH = 256  # short texts that are turned to tokens at once: of a hundred thousand, each takes a third longer
SPARE = 2  # tokens of an answer that may be generated, over those of the answer as the text spells it


class ShortLength(ValueError):
    """A length that does not hold what a task puts in at the least.

    Args:
        least: tokens that it needs.
    """

    def __init__(self, least: int) -> None:
        super().__init__(f"needs {least:,} tokens at least")
        self.least = least


@dataclass(frozen=True)
class Prompt:
    """Prompt of one sample, a single document, and what is to follow it.

    Attributes:
        tokens_T: int64 [T]; with `max_tokens` exactly the length that was asked for.
        answers: texts that the answer must hold, or one of which it must hold.
        max_tokens: of the answer.
        depth: where what is asked for lies, from 0 to 1; None where it lies everywhere.
        laps: how often the text around it reads the held-out text; above 1 it repeats, 0 where there is none in it.
        one_suffices: one of the answers is enough.
    """

    tokens_T: np.ndarray
    answers: tuple[str, ...]
    max_tokens: int
    depth: float | None = None
    laps: float = 0.0
    one_suffices: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of prompt, answers and tokens to generate: the same on every machine."""
        told = json.dumps([list(self.answers), self.max_tokens, self.one_suffices]).encode()
        return hashlib.sha256(self.tokens_T.astype("<i8").tobytes() + told).hexdigest()


def generator(seed: int, *named: object) -> np.random.Generator:
    """Return random numbers that depend on a seed and names alone."""
    text = "/".join([str(seed), *(str(name) for name in named)])
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))


class Kit:
    """What tasks make prompts with.

    Args:
        tokenizer: of the model.
        haystack: held-out text; None where there is none.

    Attributes:
        breaks: ids after which a sentence has ended.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Haystack | None) -> None:
        self.tokenizer, self._haystack = tokenizer, haystack
        self.breaks = sentence_ends(tokenizer)
        self._marks = Pieces.of([])

    @property
    def haystack(self) -> Haystack:
        """The held-out text.

        Raises:
            ConfigError: there is none.
        """
        if self._haystack is None:
            raise ConfigError("--corpus", None, "the task hides needles in held-out text, and none was found",
                              "give --corpus with a prepared corpus that has a held-out part")  # fmt: skip
        return self._haystack

    def ids(self, *pieces: str) -> np.ndarray:
        """Return the ids of pieces, each turned to tokens on its own, int64."""
        return np.array([i for piece in pieces for i in self.tokenizer.encode(piece)], dtype=np.int64)

    def many(self, texts: Sequence[str]) -> Pieces:
        """Return texts, each turned to tokens on its own."""
        batches = (list(texts[first : first + BATCH]) for first in range(0, len(texts), BATCH))
        return Pieces.of([]).then(*(Pieces.of(self.tokenizer.encode_batch(batch)) for batch in batches))

    def marks(self, count: int) -> Pieces:
        """Return the marks of a list, " 1." to " COUNT.", which are turned to tokens once for all samples."""
        if count > len(self._marks):
            more = self.many([f" {i + 1}." for i in range(len(self._marks), count)])
            self._marks = self._marks.then(more)
        return self._marks.first(count)

    def answer_room(self, least: int, answers: Sequence[str]) -> int:
        """Return the tokens that an answer may take: `least`, or more where the tokenizer needs more for it."""
        spelt = sum(len(self.ids(f" {answer},")) for answer in answers)
        return max(least, spelt + spelt // SPARE)


def check_room(room: int, length: int, least: int = 1) -> int:
    """Return the tokens left for text.

    Raises:
        ShortLength: they are fewer than `least`.
    """
    if room < least:
        raise ShortLength(length - room + least)
    return room

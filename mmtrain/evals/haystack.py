"""Held-out text as one ring of token ids, read from any document on; nothing is turned to tokens again."""

from __future__ import annotations

import numpy as np

from mmdata.corpus.documents import Documents, choose
from mmdata.corpus.split import Split
from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError

_ENDS = (".", "!", "?", ".\n", "!\n", "?\n", "\n", "\n\n")


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids after which a sentence or a line has ended, int64, ascending."""
    ends = (tokenizer.encode(f"a{end}")[-1] for end in _ENDS)
    return np.array(sorted({tokenizer.encode("\n")[-1], *ends}), dtype=np.int64)


class Haystack:
    """Held-out documents end to end, in the corpus's order, the first after the last.

    Where a document ends there is a line break in place of the end-of-document token, as a model resets there.

    Args:
        held_out: the documents; None if the corpus holds none out.
        source: the corpus as the user named it, for messages.
        tokenizer: the run's.
        vocab_size: of the model.

    Attributes:
        num_tokens: tokens of the ring.
        breaks: ids after which a sentence or a line has ended.

    Raises:
        ConfigError: there is no held-out text.
    """

    def __init__(self, held_out: Split | None, source: str, tokenizer: Tokenizer, vocab_size: int) -> None:
        if held_out is None or held_out.num_tokens == 0:
            raise ConfigError("evals.needles.enabled", "true", f"{source} has no held-out part to hide needles in",
                              "prepare it with --valid-fraction 0.01, or give evals.needles.enabled=false")  # fmt: skip
        self._corpus, self._vocab_size, self._eod = held_out.corpus, vocab_size, tokenizer.eod_id
        self._documents: Documents = held_out.kept or choose(held_out.corpus, held_out.documents)
        self._ends = np.cumsum(self._documents.lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1])
        self._line_break = tokenizer.encode("\n")[-1]
        self.breaks = sentence_ends(tokenizer)

    def laps(self, count: int) -> float:
        """Return how often so many tokens read the held-out text; above 1 it repeats."""
        return count / self.num_tokens

    def read(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return so many tokens, int64, from the beginning of some document on.

        Past `num_tokens` the text repeats.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        first = int(rng.integers(len(self._documents)))
        lap = self._lap(first, min(count, self.num_tokens))
        return np.resize(np.where(lap == self._eod, self._line_break, lap), count)

    def documents_of(self, count: int) -> np.ndarray:
        """Return the places of the documents that have more than so many tokens, int64: so many without their end."""
        return np.flatnonzero(np.asarray(self._documents.lengths) > count)

    def beginning_of(self, document: int, count: int) -> np.ndarray:
        """Return the first tokens, int64, of a document by its place.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        return self._lap(document, count)

    def _lap(self, first: int, count: int) -> np.ndarray:
        """Return up to a whole ring of tokens from document `first` on."""
        begin = int(self._ends[first] - self._documents.lengths[first])
        last = int(np.searchsorted(self._ends, begin + count))
        places = np.arange(first, min(last + 1, len(self._documents)))
        if (rest := begin + count - self.num_tokens) > 0:
            places = np.append(places, np.arange(np.searchsorted(self._ends, rest) + 1))
        lengths = np.asarray(self._documents.lengths[places], dtype=np.int64)
        before = np.cumsum(lengths) - lengths
        offsets = np.asarray(self._corpus.doc_offsets[self._documents.id_of(places)], dtype=np.int64)
        index = (np.repeat(offsets - before, lengths) + np.arange(int(lengths.sum())))[:count]
        tokens = self._corpus.data[index].astype(np.int64)
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            self._corpus.refuse_token(int(index[np.argmax(wrong)]), self._vocab_size)
        return tokens

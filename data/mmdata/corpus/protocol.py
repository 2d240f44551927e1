"""The two Protocols of a corpus: `Corpus`, an open one as rows read it, and `CorpusFormat`, its format on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.tokenizer_identity import TokenizerIdentity


class Corpus(Protocol):
    """Protocol of an open corpus: documents that are tokens already, whatever the format of their files.

    A corpus must pickle (by path, say): worker processes of the loader open their own.

    Attributes:
        prefix: path that messages name the corpus by.
        tokens_path: file that messages name a bad token's place by.
        num_documents, num_tokens: totals.
        num_empty: documents without a token.
        doc_lengths: int64[num_documents], tokens of each document; 0 is allowed.
        doc_offsets: int64[num_documents], where each document starts in `data`.
        data: integers[num_tokens] of any width, every document's tokens end to end. Rows are read with arrays of
            positions, `data[index]`, so a memory map will do.
    """

    prefix: Path
    tokens_path: Path
    num_documents: int
    num_tokens: int
    num_empty: int
    doc_lengths: np.ndarray
    doc_offsets: np.ndarray
    data: np.ndarray

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, all doc_lengths[i] of them."""

    def fingerprint(self) -> dict[str, Any]:
        """Facts, as JSON, by which a later launch knows the corpus again wherever it lies; cheap at any size.

        `mmdata.corpus.fingerprint.difference` compares ``documents``, ``tokens`` and ``files``: `{kind: {"bytes",
        "sample", and "sha256" where it is known}}`.
        """

    def recorded_max_id(self) -> int | None:
        """Largest token id of the corpus if it is known without reading the tokens, else None."""

    def refuse_token(self, position: int, vocab_size: int) -> NoReturn:
        """Raise the error for the token at `position` of `data`, which is not in 0..vocab_size-1.

        Raises:
            DataError: always; it names the file, the document, the token id and the fix.
        """


class CorpusFormat(Protocol):
    """Protocol of a format on disk of tokenised documents. `source` is `data.path` as the user wrote it.

    Attributes:
        keeps_valid: whether the format has held-out documents of its own. If not, they are chosen by a hash.
    """

    keeps_valid: bool

    def matches(self, source: str) -> bool:
        """Whether `source` names a corpus of this format. `open_corpus` asks the formats in the registry's order."""

    def train(self, source: str, cache: ArrayCache | None = None) -> Corpus:
        """Documents to train on; all documents where `keeps_valid` is False. `cache` keeps what is slow to work out.

        Raises:
            DataError: a file is missing, truncated or corrupt.
        """

    def valid(self, source: str, cache: ArrayCache | None = None) -> Corpus | None:
        """Held-out documents that the format keeps; None where there are none.

        Raises:
            DataError: a file is truncated or corrupt.
        """

    def tokenizer(self, source: str) -> Path:
        """Path of the corpus's own tokenizer, fit for `load_tokenizer`.

        Raises:
            DataError: there is no such corpus, or no tokenizer with it.
        """

    def tokenizer_identity(self, source: str) -> TokenizerIdentity | None:
        """Identity of the tokenizer that made the corpus; None where nothing on disk says it.

        Raises:
            DataError: what the disk says contradicts itself.
        """

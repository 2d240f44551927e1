"""Training the byte-level BPE tokenizer on a sample of the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mmdata.errors import DataError
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece, read_piece
from mmdata.prepare.text_files import Separator
from mmdata.text_parts import PartCutter, byte_level_cut
from mmdata.tokenizer import EOD_TOKEN

SAMPLE_BYTES = 64_000_000  # text that BPE is trained on, at most; more changes the merges little
MIN_VOCAB = 257  # 256 bytes and the end-of-document token


@contextmanager
def tokenizer_threads(enabled: bool) -> Iterator[None]:
    """Let the tokenizers package use threads of its own inside the block, or not (and never warn about forks)."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if enabled else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class Sample:
    """Texts to train on: all texts, or for a corpus over `limit` bytes the first of every shard in equal shares.

    The sample is a function of the files alone. Long documents come in parts, cut where BPE's pre-tokenizer cuts them.

    Attributes:
        documents: documents read so far.
        bytes: of the texts read so far.
        skips: what could not be read.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Piece]],
        text_field: str,
        separator: Separator | None = None,
        limit: int = SAMPLE_BYTES,
    ) -> None:
        self._shards, self._text_field, self._separator, self._limit = shards, text_field, separator, limit
        self.documents = self.bytes = 0
        self.skips = SkipLog()

    def __iter__(self) -> Iterator[str]:
        total = max(1, sum(piece.weight for shard in self._shards for piece in shard))
        for shard in self._shards:
            share = self._limit * sum(piece.weight for piece in shard) / total
            yield from self._of_shard(shard, share if total > self._limit else float("inf"))

    def _of_shard(self, shard: Sequence[Piece], budget: float) -> Iterator[str]:
        items = (item for piece in shard for item in read_piece(piece, self._text_field, self._separator))
        cutter, taken, size = PartCutter(byte_level_cut), 0, 0  # of the document at hand
        for item in items:
            if isinstance(item, Skip):
                self.skips.add(item)
                cutter, taken, size = PartCutter(byte_level_cut), 0, 0
                continue
            text = item.text
            over = taken + len(text) > budget
            if over:
                text = text[: int(budget) + 1 - taken]
            taken, size = taken + len(text), size + len(item.data)
            whole = over or not item.more
            for part in cutter.take(text, last=whole):
                self.bytes += len(part.encode("utf-8"))
                yield part
            if whole:
                self.documents += 1
                budget -= size
                cutter, taken, size = PartCutter(byte_level_cut), 0, 0
                if budget <= 0:
                    return


class Texts(Protocol):
    """Protocol of texts to train on; the counts and skips are of those read so far (see `Sample`)."""

    documents: int
    bytes: int
    skips: SkipLog

    def __iter__(self) -> Iterator[str]:
        """The texts."""


def train_bpe(sample: Texts, vocab_size: int, path: Path, special: Sequence[str] = ()) -> dict[str, int]:
    """Train a byte-level BPE of up to `vocab_size` tokens, save it as `path`, return `documents` and `bytes` seen.

    The alphabet is all 256 bytes, so every text can be encoded, and EOD is "<end_of_document>", id 0. Tokens `special`,
    which no text gives, follow it.

    Raises:
        DataError: `vocab_size` is under 257 (and one more for each of `special`), or there is no text at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = MIN_VOCAB + len(special)
    if vocab_size < least:
        raise DataError(f"--vocab-size is {vocab_size}: byte-level BPE needs at least {least}, for example 32768")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tokenizer_threads(True):
        backend.train_from_iterator(iter(sample), trainer=trainer)
    if sample.documents == 0:
        raise DataError(f"the corpus is empty: no usable document in --input ({sample.skips.reasons()})")
    backend.save(str(path))
    return {"documents": sample.documents, "bytes": sample.bytes}

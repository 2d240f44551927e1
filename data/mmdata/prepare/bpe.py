"""Training the byte-level BPE tokenizer on a sample of the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmdata.errors import DataError
from mmdata.prepare.sources import Document, Piece, read_piece
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


def sample_texts(shards: Sequence[Sequence[Piece]], text_field: str, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """Texts to train on: all texts, or for a corpus over `limit` bytes the first of every shard in equal shares.

    The sample is a function of the files alone.
    """
    total = max(1, sum(piece.weight for shard in shards for piece in shard))
    for shard in shards:
        budget = limit * sum(piece.weight for piece in shard) / total if total > limit else float("inf")
        for piece in shard:
            for item in read_piece(piece, text_field):
                if isinstance(item, Document):
                    yield item.text[: int(budget) + 1] if budget < len(item.text) else item.text
                    budget -= len(item.data)
                if budget <= 0:
                    break
            if budget <= 0:
                break


def train_bpe(shards: Sequence[Sequence[Piece]], text_field: str, vocab_size: int, path: Path) -> dict[str, int]:
    """Train a byte-level BPE of up to `vocab_size` tokens, save it as `path`, return `documents` and `bytes` seen.

    The alphabet is all 256 bytes, so every text can be encoded, and EOD is "<end_of_document>", id 0.

    Raises:
        DataError: `vocab_size` is under 257, or there is no text at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB:
        raise DataError(f"--vocab-size is {vocab_size}: byte-level BPE needs at least {MIN_VOCAB}, for example 32768")
    used = {"documents": 0, "bytes": 0}

    def counted() -> Iterator[str]:
        for text in sample_texts(shards, text_field):
            used["documents"] += 1
            used["bytes"] += len(text.encode("utf-8"))
            yield text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with tokenizer_threads(True):
        backend.train_from_iterator(counted(), trainer=trainer)
    if used["documents"] == 0:
        raise DataError("the corpus is empty: no readable document in --input, so no tokenizer can be trained")
    backend.save(str(path))
    return used

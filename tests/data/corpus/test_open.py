"""The registry of corpus formats: which format takes a path, and a format that only this test knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus import open as registry
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.open import open_corpus, tokenizer_path
from mmdata.corpus.split import split_documents
from mmdata.corpus.token_range import check_token_range
from mmdata.errors import DataError
from mmdata.rows.loader import micro_batches
from mmdata.rows.stream import RowStream
from tests.data.corpus.toy import ToyCorpus, ToyFormat, write_toy

DOCUMENTS = [[i % 7 + 1] * (i % 5) + [i, 0] for i in range(60)]
OPTIONS = {"vocab_size": 60, "valid_fraction": 0.2, "seed": 3}


def test_a_pair_is_split_by_hash_and_a_folder_keeps_its_own(megatron_corpus: Callable[..., Path]) -> None:
    pair = megatron_corpus([[document] for document in DOCUMENTS], name="train")
    for source in (str(pair), f"{pair}.bin", f"{pair}.idx"):
        train, valid = open_corpus(source, **OPTIONS)
        assert train.corpus is valid.corpus and train.corpus.prefix == pair and not valid.is_empty
        assert sorted([*train.documents, *valid.documents]) == list(range(60))
    assert open_corpus(str(pair), **OPTIONS | {"valid_fraction": 0.0})[1].is_empty
    train, valid = open_corpus(str(pair.parent), **OPTIONS)
    assert train.corpus.prefix == pair and train.documents is None and valid is None
    held = megatron_corpus([[[1, 2, 3]]], name="valid")
    valid = open_corpus(str(pair.parent), **OPTIONS)[1]
    assert valid.corpus.prefix == held and valid.documents is None and not valid.is_empty


def test_a_corpus_beyond_the_vocabulary_is_refused(megatron_corpus: Callable[..., Path]) -> None:
    pair = megatron_corpus([[document] for document in DOCUMENTS], name="train")
    for source in (pair, pair.parent):
        with pytest.raises(DataError, match=r"token id 59 is outside 0\.\.58"):
            open_corpus(str(source), **OPTIONS | {"vocab_size": 59})


def test_a_tokenizer_lies_in_the_folder_or_beside_the_pair(megatron_corpus: Callable[..., Path]) -> None:
    pair = megatron_corpus([[[1]]])
    assert tokenizer_path(str(pair.parent)) == pair.parent
    with pytest.raises(DataError, match=r"data\.path=\S+ has no tokenizer.json beside it: give data.tokenizer=PATH"):
        tokenizer_path(f"{pair}.bin")
    with pytest.raises(DataError, match=r"data\.path=\./nowhere: there is no such corpus; prepare one"):
        tokenizer_path("./nowhere")
    (pair.parent / "tokenizer.json").write_text("{}")
    assert tokenizer_path(f"{pair}.bin") == tokenizer_path(str(pair)) == pair.parent


def test_a_new_format_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy(tmp_path / "some.toy", DOCUMENTS)
    with pytest.raises(DataError, match="is missing"):
        open_corpus(str(path), **OPTIONS)
    monkeypatch.setattr(registry, "FORMATS", (ToyFormat(), *registry.FORMATS))
    train, valid = open_corpus(str(path), **OPTIONS)
    assert isinstance(train.corpus, ToyCorpus) and not valid.is_empty
    assert tokenizer_path(str(path)) == tmp_path / "toy_tokenizer"
    with pytest.raises(DataError, match="toy token 59 is outside"):
        open_corpus(str(path), **OPTIONS | {"vocab_size": 59})
    write_toy(tmp_path / "some.valid.toy", [[5, 0]])
    monkeypatch.setattr(registry, "FORMATS", (ToyFormat(keeps_valid=True), *registry.FORMATS))
    train, valid = open_corpus(str(path), **OPTIONS)
    assert train.documents is None and valid.corpus.num_documents == 1


def test_formats_give_equal_rows(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    """The same documents in either format: split, checked, streamed and batched (by a worker process too) alike."""
    toy = ToyCorpus(write_toy(tmp_path / "some.toy", DOCUMENTS))
    indexed = IndexedCorpus(megatron_corpus([[document] for document in DOCUMENTS], np.int64))
    for a, b in zip(split_documents(toy, 0.3, 1), split_documents(indexed, 0.3, 1), strict=True):
        assert np.array_equal(a, b)
    assert "all below 60" in check_token_range(toy, 60)
    options = dict(seq_len=16, seed=3, eod_id=0, documents=split_documents(toy, 0.3)[0], vocab_size=60)
    for packing in ("concat", "best_fit"):
        ours, theirs = (RowStream(corpus, packing=packing, **options) for corpus in (toy, indexed))
        assert all(np.array_equal(ours[i].tokens, theirs[i].tokens) for i in range(50))
    batch = next(micro_batches(ours, [[0, 1]], num_workers=1))
    assert np.array_equal(batch.tokens_BS[1].numpy(), theirs[1].tokens)
    with pytest.raises(DataError, match="toy token"):
        small = RowStream(toy, packing="concat", **options | {"vocab_size": 30})
        [small[i] for i in range(50)]

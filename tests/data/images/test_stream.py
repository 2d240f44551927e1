"""Packed rows with images against documents one by one: whole images, labels, pairs, resume, shares of ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmdata import open_corpus
from mmdata.errors import DataError
from mmdata.images.corpus import ImageCorpus
from mmdata.images.grid import image_tokens
from mmdata.images.stream import ImageStream, left_out_lines, open_stream
from mmdata.images.stream_batches import image_batches
from mmdata.rows.mixture import Mixture
from mmdata.rows.share_schedule import Segment
from mmdata.rows.stream import RowStream
from mmdata.rows.token_mixture import Component, TokenMixture
from tests.data.images.made import SMALL, prepared, write_images, write_records

FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "pairs")
SIZES = [(16, 16), (40, 16), (16, 50), (33, 31), (9, 9), (64, 64), (31, 16)]
ROW = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> ImageCorpus:
    """Captions, questions, long interleaved documents, pairs and plain text."""
    folder = tmp_path_factory.mktemp("records")
    names = write_images(folder, SIZES)
    records = [{"image": name, "caption": f"caption {i} of {name}"} for i, name in enumerate(names)]
    records += [{"image": name, "question": f"what is {i}", "answer": "yes" * i} for i, name in enumerate(names, 1)]
    long = " ".join(f"part {i} <image> of a long text" for i in range(len(names)))
    records += [{"text": long, "images": names}, {"text": long[::-1].replace(">egami<", "<image>"), "images": names}]
    records += [{"prompt": "say", "chosen": "good", "rejected": "bad", "images": names[:1]}] * 2
    records += [{"text": "no image at all " * k} for k in (1, 9)]
    return prepared(write_records(folder, records), folder / "corpus")


def stream_of(corpus, seed=3, seq_len=ROW, **options) -> ImageStream:
    return ImageStream(corpus, seq_len=seq_len, seed=seed, eod_id=0, vocab_size=300, **options)


def same(a, b) -> bool:
    return a.images == b.images and all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_documents_hold_as_many_placeholders_as_their_images_have_tokens(corpus):
    for place in corpus.places:
        image = corpus.table.images[place["image"]]
        assert place["tokens"] == image_tokens(int(image["width"]), int(image["height"]), SMALL)
        assert (corpus.data[place["first"] : place["first"] + place["tokens"]] == corpus.image_id).all()
    assert (corpus.data == corpus.image_id).sum() == corpus.places["tokens"].sum()


def test_no_image_is_cut_and_each_document_comes_once(corpus):
    stream = stream_of(corpus)
    seen, images = np.zeros(corpus.num_tokens, dtype=int), 0
    for i in range(stream.rows_per_epoch()):
        row = stream[i]
        covered = np.zeros(ROW, dtype=bool)
        for image in row.images:
            assert image.first >= 0 and image.first + image.tokens <= ROW
            covered[image.first : image.first + image.tokens] = True
            assert image.tokens == image_tokens(image.width, image.height, SMALL)
            piece = np.searchsorted(row.cu_seqlens, image.first, side="right")
            assert image.first + image.tokens <= row.cu_seqlens[piece]
        assert np.array_equal(row.tokens == corpus.image_id, covered)
        images += len(row.images)
        pieces = stream._plan.pieces(i)
        for document, start, length in zip(*pieces, strict=True):
            seen[corpus.doc_offsets[document] + start :][:length] += 1
    kept = np.ones(corpus.num_tokens, dtype=int)
    for document in stream.left_out:
        kept[corpus.doc_offsets[document] :][: corpus.doc_lengths[document]] = 0
    assert np.array_equal(seen, kept)
    assert images == len(corpus.places) and len(stream.left_out) == 0
    assert stream.pads and (stream._plan.pieces(0).lengths.sum() <= ROW)


def test_a_long_document_is_cut_before_an_image(corpus):
    stream, cut = stream_of(corpus, seq_len=40), 0
    for i in range(stream.rows_per_epoch()):
        for document, start, length in zip(*stream._plan.pieces(i), strict=True):
            stop = corpus.doc_offsets[document] + start + length
            ends = start + length < corpus.doc_lengths[document]
            cut += ends
            if ends and length < 40:
                assert stop in corpus.places["first"]  # room was left only because an image would not fit
    assert cut > 5


def test_labels_are_the_next_tokens_that_the_record_says(corpus):
    stream = stream_of(corpus)
    for i in range(stream.rows_per_epoch()):
        row, pieces = stream[i], stream._plan.pieces(i)
        assert not (row.loss_mask & (row.labels == corpus.image_id)).any()
        at = 0
        for document, start, length in zip(*pieces, strict=True):
            first, half = int(corpus.doc_offsets[document]), int(corpus.halves[document])
            for k in range(length):
                last = start + k + 1 in (corpus.doc_lengths[document], half)
                following = first + start + k + 1
                learned = not last and bool(corpus.is_label(np.array([following]))[0])
                assert row.loss_mask[at + k] == learned
                assert row.labels[at + k] == (0 if last else corpus.data[following])
            at += length
    # Of a question only the answer is learned, what ends its turn, and the end of the document.
    question = next(d for d in range(corpus.num_documents) if not corpus.halves[d] and corpus.doc_lengths[d] < ROW
                    and not corpus.is_label(np.arange(corpus.num_tokens))[corpus.doc_offsets[d] :][: 9].any()
                    and corpus.data[corpus.doc_offsets[d]] != corpus.image_id)  # fmt: skip
    learned = corpus.is_label(corpus.doc_offsets[question] + np.arange(corpus.doc_lengths[question]))
    assert 0 < learned.sum() < len(learned) and learned[-1] and np.diff(learned.astype(int)).clip(0).sum() == 1


def test_pairs_are_whole_and_their_answers_apart(corpus):
    stream, found = stream_of(corpus), 0
    for i in range(stream.rows_per_epoch()):
        row = stream[i]
        for begin, middle, end in row.pairs.tolist():
            assert {begin, middle, end} <= set(row.cu_seqlens.tolist())
            a, b = row.tokens[begin:middle], row.tokens[middle:end]
            assert a[-1] == b[-1] == 0 and not row.loss_mask[[middle - 1, end - 1]].any()
            common = next(k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            assert not row.loss_mask[begin : begin + common - 1].any()  # the prompt
            assert row.loss_mask[begin : middle - 1].any() and row.loss_mask[middle : end - 1].any()
            assert row.position_ids[middle] == 0
            found += 1
    assert found == 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_are_a_function_of_their_number(corpus, ranks):
    stream, again = stream_of(corpus), pickle.loads(pickle.dumps(stream_of(corpus)))
    rows = [stream[i] for i in range(12)]
    for i in reversed(range(12)):
        assert same(again[i], rows[i])
    for start in range(0, 12, ranks):  # resumed at any position, shared out among any number of ranks
        for rank in range(ranks):
            numbers = list(range(start + rank, 12, ranks))
            batches = image_batches(stream_of(corpus), [[i] for i in numbers])
            for batch, i in zip(batches, numbers, strict=True):
                assert batch.rows == (i,) and batch.tokens_BS[0].tolist() == rows[i].tokens.tolist()
                assert batch.loss_mask_BS[0].tolist() == rows[i].loss_mask.tolist()
                assert [image.source for image in batch.images] == list(rows[i].images)
    other = stream_of(corpus, seed=4)
    assert not all(same(other[i], rows[i]) for i in range(4))


def test_a_row_too_short_for_an_image_leaves_its_documents_out(corpus):
    longest = int(corpus.places["tokens"].max())
    stream = stream_of(corpus, seq_len=longest - 1)
    large = corpus.documents_of(corpus.places["first"][corpus.places["tokens"] == longest])
    assert set(large) <= set(stream.left_out) and len(stream.left_out) < corpus.num_documents
    (line,) = left_out_lines(stream)
    assert f"{len(stream.left_out)} documents" in line and f"seq_len {longest - 1}" in line and str(large[0]) in line
    for i in range(stream.rows_per_epoch()):
        assert not set(stream._plan.pieces(i).documents) & set(stream.left_out)
    pairs = np.flatnonzero(corpus.halves)
    assert set(pairs) <= set(stream_of(corpus, seq_len=int(corpus.doc_lengths[pairs[0]]) - 1).left_out)
    with pytest.raises(DataError, match=r"nothing is left; use a larger seq_len"):
        ImageStream(corpus, seq_len=3, seed=0, eod_id=0, documents=large)


def test_text_is_mixed_in_by_weight(corpus, numbered_corpus):
    text = RowStream(numbered_corpus([500, 700]), seq_len=ROW, seed=0, eod_id=0)
    mixture = Mixture([stream_of(corpus), text], [20, 1], seed=0)
    sources = [mixture.locate(i)[0] for i in range(2100)]
    assert sources.count(1) in (99, 100, 101)
    rows = [mixture[i] for i in range(60)]
    assert all(row.real_tokens is not None for row in rows)
    assert any(not hasattr(row, "images") for row in rows)
    numbers = [[i, i + 1] for i in range(0, 60, 2)]
    batches = list(image_batches(mixture, numbers))
    assert [batch.rows for batch in batches] == [tuple(pair) for pair in numbers]
    assert all(batch.real_tokens is not None for batch in batches)


def test_a_mixture_by_tokens_refuses_images(corpus):
    documents = stream_of(corpus)._documents
    with pytest.raises(DataError, match="which a mixture by tokens would cut"):
        TokenMixture([Component(corpus, documents)], [Segment(None, (1,), (1,))], seq_len=ROW, seed=0, eod_id=0)


def test_the_folder_is_opened_as_a_corpus_with_images(corpus):
    folder = corpus.prefix.parent
    train, valid = open_corpus(str(folder), vocab_size=300, valid_fraction=0.5, seed=0)
    assert isinstance(train.corpus, ImageCorpus) and valid is None and train.corpus.rules == SMALL
    stream = open_stream(train.corpus, packing="concat", seq_len=ROW, seed=3, eod_id=0, vocab_size=300)
    assert same(stream[5], stream_of(corpus)[5])
    assert {"places", "labels", "halves", "images"} <= set(corpus.fingerprint()["files"])


def test_missing_images_and_tables_are_found_when_opened(tmp_path):
    names = write_images(tmp_path / "data", SIZES[:3])
    records = write_records(tmp_path / "data", [{"image": name, "caption": name} for name in names])
    folder = prepared(records, tmp_path / "data/corpus").prefix.parent
    moved = Path(tmp_path / "elsewhere")
    (tmp_path / "data").rename(moved)  # images and corpus together
    folder = moved / "corpus"
    opened = open_corpus(str(folder), vocab_size=300, valid_fraction=0, seed=0)[0].corpus
    assert len(next(image_batches(stream_of(opened), [[0]])).failures) == 0
    (moved / "1.png").rename(moved / "gone.png")
    with pytest.raises(DataError, match=r"1\.png .*cannot be read .*put the images back"):
        open_corpus(str(folder), vocab_size=300, valid_fraction=0, seed=0)
    (folder / "train.labels.bin").write_bytes(b"x" * 999)
    with pytest.raises(DataError, match=r"train\.labels\.bin .*999 bytes"):
        ImageCorpus(folder / "train")
    (folder / "train.images.npy").unlink()
    with pytest.raises(DataError, match=r"train\.images\.npy is missing"):
        ImageCorpus(folder / "train")

"""Both packings against slow, plain implementations that follow the definitions token by token."""

import itertools
import pickle

import numpy as np
import pytest

from mmdata.errors import DataError
from mmdata.hashing import mix_array, mix_int, permuted, shuffled
from mmdata.rows.packing import best_fit
from mmdata.rows.stream import RowStream

EOD = 0
LENGTHS = [5, 1, 0, 33, 2, 8, 8, 17, 3, 1, 64, 7, 9, 16, 15, 4, 40]
FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def stream_of(corpus, packing="concat", seq_len=16, seed=3, **options):
    return RowStream(corpus, seq_len=seq_len, seed=seed, packing=packing, eod_id=EOD, **options)


def equal(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def owner_of(corpus, row, start, stop):
    """(document, offset) of a piece, from its first token, which is unique; None for padding."""
    if row.tokens[start] == EOD:
        return None
    position = int(row.tokens[start]) - 1  # tokens are 1, 2, ... in the corpus's order
    document = corpus.document_at(position)
    return document, position - int(corpus.doc_offsets[document])


def check_row(corpus, row, seq_len):
    """Everything that must hold for one row; returns its pieces but padding as (document, offset, length)."""
    assert [getattr(row, f).dtype for f in FIELDS] == [np.int32, np.int32, np.bool_, np.int32, np.int32]
    assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == seq_len and (np.diff(row.cu_seqlens) > 0).all()
    pieces = []
    for start, stop in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
        length = int(stop - start)
        assert row.position_ids[start:stop].tolist() == list(range(length))
        owner = owner_of(corpus, row, start, stop)
        if owner is None:
            assert stop == seq_len and (row.tokens[start:stop] == EOD).all()
            assert (row.labels[start:stop] == EOD).all() and not row.loss_mask[start:stop].any()
            continue
        document, offset = owner
        whole = corpus.document(document)
        for k in range(length):
            assert row.tokens[start + k] == whole[offset + k]
            last = offset + k + 1 == len(whole)
            assert row.loss_mask[start + k] == (not last)
            assert row.labels[start + k] == (EOD if last else whole[offset + k + 1])
        pieces.append((document, offset, length))
    return pieces


def naive_concat(corpus, seed, epochs):
    """The endless sequence as (token, label, counts, starts a document) for some epochs."""
    ids = np.flatnonzero(corpus.doc_lengths > 0)
    out = []
    for epoch in range(epochs):
        for place in shuffled(np.arange(len(ids)), seed, epoch, 0):
            tokens = corpus.document(int(ids[place])).tolist()
            for k, token in enumerate(tokens):
                last = k + 1 == len(tokens)
                out.append((token, EOD if last else tokens[k + 1], not last, k == 0))
    return out


@pytest.mark.parametrize("seq_len", [1, 7, 16, 100])
def test_concat_equals_naive(numbered_corpus, seq_len):
    corpus = numbered_corpus(LENGTHS)
    stream = stream_of(corpus, seq_len=seq_len)
    flat = naive_concat(corpus, 3, 3)
    total = len(flat) // 3
    for epoch in range(3):  # the rows that end within an epoch, in an order of their own
        places = range(epoch * total // seq_len, (epoch + 1) * total // seq_len)
        by_tokens = {tuple(w[0] for w in flat[j * seq_len : (j + 1) * seq_len]): j for j in places}
        found = [by_tokens[tuple(stream[i].tokens.tolist())] for i in places]
        assert sorted(found) == list(places) and (len(places) < 5 or found != list(places))
        for i, j in zip(places, found, strict=True):
            check_naive_row(stream[i], flat[j * seq_len : (j + 1) * seq_len], seq_len)


def check_naive_row(row, want, seq_len):
    """A row against its (token, label, counts, starts a document) tuples."""
    assert row.tokens.tolist() == [w[0] for w in want]
    assert row.labels.tolist() == [w[1] for w in want]
    assert row.loss_mask.tolist() == [w[2] for w in want]
    bounds = [k for k, w in enumerate(want) if k == 0 or w[3]] + [seq_len]
    assert row.cu_seqlens.tolist() == bounds
    positions = [k for a, b in itertools.pairwise(bounds) for k in range(b - a)]
    assert row.position_ids.tolist() == positions


def test_concat_epoch_holds_every_token_once_but_the_tail(numbered_corpus):
    corpus = numbered_corpus(LENGTHS)
    stream = stream_of(corpus)
    total = sum(LENGTHS)
    rows = stream.rows_per_epoch(0)
    assert rows == total // 16 and stream.efficiency() == 1.0
    seen = np.concatenate([stream[i].tokens for i in range(rows)])
    assert len(seen) == len(set(seen.tolist()))
    assert total - len(seen) == total % 16
    # over epochs the carried tails leave nothing out: 16 epochs are a whole number of rows
    assert sum(stream.rows_per_epoch(e) for e in range(16)) == total
    counts = np.bincount(np.concatenate([stream[i].tokens for i in range(total)]))
    assert (counts[1:] == 16).all() and counts[EOD] == 0


@pytest.mark.parametrize("seq_len", [1, 7, 16, 100])
def test_best_fit_rows_are_exact_and_whole(numbered_corpus, seq_len):
    corpus = numbered_corpus(LENGTHS)
    stream = stream_of(corpus, "best_fit", seq_len)
    first = 0
    for epoch in range(3):
        rows = stream.rows_per_epoch(epoch)
        pieces = [p for i in range(first, first + rows) for p in check_row(corpus, stream[i], seq_len)]
        assert sum(stream[i].real_tokens for i in range(first, first + rows)) == sum(LENGTHS)
        want = [
            (document, start, min(seq_len, size - start))
            for document, size in enumerate(LENGTHS)
            for start in range(0, size, seq_len)  # a document that fits in a row is one piece
        ]
        assert sorted(pieces) == want
        assert stream.efficiency(epoch) == pytest.approx(sum(LENGTHS) / (rows * seq_len))
        first += rows


def naive_best_fit(lengths, row):
    gaps, result = [], []
    for length in lengths:
        fitting = [(gap, k) for k, gap in enumerate(gaps) if gap >= length]
        if fitting:
            _, k = min(fitting)
            gaps[k] -= length
        else:
            k = len(gaps)
            gaps.append(row - length)
        result.append(k)
    return result, gaps


def test_best_fit_fills_rows_as_the_definition_does():
    rng = np.random.default_rng(0)
    for row in (10, 50, 1000):
        lengths = np.sort(rng.integers(1, row + 1, 300))[::-1].copy()
        rows = best_fit(lengths, row)
        fill = np.bincount(rows, weights=lengths)
        _, gaps = naive_best_fit(lengths.tolist(), row)
        assert fill.max() <= row and set(rows.tolist()) == set(range(len(gaps)))
        assert sorted(row - fill) == sorted(gaps)  # equal gaps may be used in another order


def test_best_fit_windows_cover_the_corpus(numbered_corpus, monkeypatch):
    monkeypatch.setattr("mmdata.rows.packing.WINDOW_DOCUMENTS", 4)
    monkeypatch.setattr("mmdata.rows.packing.WINDOW_ROWS", 1)
    corpus = numbered_corpus([*LENGTHS * 3, 6, 2])
    stream = stream_of(corpus, "best_fit")
    assert stream._plan._windows > 3 and stream.num_documents % stream._plan._windows  # windows of unequal sizes
    rows = stream.rows_per_epoch(0) + stream.rows_per_epoch(1)
    counts = np.bincount(np.concatenate([stream[i].tokens for i in range(rows)]))
    assert (counts[1:] == 2).all() and len(counts) == corpus.num_tokens + 1


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_are_pure(numbered_corpus, packing):
    corpus = numbered_corpus(LENGTHS)
    forward = [stream_of(corpus, packing)[i] for i in range(60)]
    one = stream_of(corpus, packing)
    for i in np.random.default_rng(0).permutation(60):
        assert equal(one[int(i)], forward[i])
    assert equal(pickle.loads(pickle.dumps(one))[41], forward[41])
    other = stream_of(corpus, packing, seed=4)
    assert not all(equal(other[i], forward[i]) for i in range(10))
    epoch = one.rows_per_epoch(0)
    assert not all(equal(one[i], one[epoch + i]) for i in range(5))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_chosen_documents_only(numbered_corpus, packing):
    corpus = numbered_corpus(LENGTHS)
    chosen = np.array([3, 5, 2, 10])
    stream = stream_of(corpus, packing, documents=chosen)
    seen = set(np.concatenate([stream[i].tokens for i in range(stream.rows_per_epoch(0))]).tolist()) - {EOD}
    allowed = set(np.concatenate([corpus.document(int(i)) for i in chosen]).tolist())
    assert seen <= allowed and len(seen) > len(allowed) - 17


def test_shuffle_is_splitmix64_and_stays():
    # reference: the published splitmix64 sequence from state 0, and a shuffle pinned once for all
    assert mix_int(0) == 0xE220A8397B1DCDAF and mix_int(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    values = np.array([0, 1, 2**63], dtype=np.uint64)
    assert mix_array(values).tolist() == [mix_int(int(v)) for v in values]
    assert shuffled(np.arange(8), 1, 0).tolist() == [5, 6, 1, 3, 4, 0, 7, 2]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_permuted_is_a_shuffle_that_stays(n):
    orders = {salt: [permuted(i, n, salt) for i in range(n)] for salt in range(4)}
    assert all(sorted(order) == list(range(n)) for order in orders.values())
    if n == 1000:
        assert orders[0][:6] == [980, 877, 30, 79, 491, 120]
        assert len({tuple(order) for order in orders.values()}) == 4
        moved = np.abs(np.array(orders[0]) - np.arange(n)).mean()
        assert 250 < moved < 420  # a third of n for a random order
        assert permuted(10**11, 10**12, 5) != permuted(10**11 + 1, 10**12, 5) < 10**12


def test_bad_options_and_empty_corpora(numbered_corpus):
    corpus = numbered_corpus([0, 5, 0])
    with pytest.raises(DataError, match="packing is 'bestfit'"):
        stream_of(corpus, "bestfit")
    with pytest.raises(DataError, match="seq_len is 0"):
        stream_of(corpus, seq_len=0)
    with pytest.raises(DataError, match="5 usable tokens, less than one row"):
        stream_of(corpus, seq_len=6)
    assert stream_of(corpus, "best_fit", seq_len=6).rows_per_epoch() == 1
    with pytest.raises(DataError, match="no document with a token"):
        stream_of(corpus, documents=np.array([0, 2]))
    with pytest.raises(DataError, match="documents go from"):
        stream_of(corpus, documents=np.array([3]))
    with pytest.raises(IndexError):
        stream_of(corpus, seq_len=2)[-1]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_token_out_of_range_is_named(numbered_corpus, packing):
    corpus = numbered_corpus([10, 10])  # tokens 1..10 and 11..20
    stream = stream_of(corpus, packing, seq_len=20, vocab_size=20)
    with pytest.raises(DataError, match=r"numbered.bin, document 1: token id 20 is outside 0\.\.19"):
        stream[0]
    assert stream_of(corpus, packing, seq_len=20, vocab_size=21)[0].tokens.max() == 20


def test_label_out_of_range_is_named(numbered_corpus):
    corpus = numbered_corpus([4])  # 1 2 3 4; the bad id is first met as row 0's last label
    stream = stream_of(corpus, seq_len=2, vocab_size=3)
    with pytest.raises(DataError, match="token id 3"):
        stream[0]

"""What is kept on disk about a large corpus: equal to what is worked out anew, found again, never of another corpus."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus import documents, indexed, kept_split, token_range
from mmdata.corpus.array_cache import ArrayCache, Entry
from mmdata.corpus.document_hashes import document_hashes
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.open import open_corpus
from mmdata.corpus.split import Split, split_documents
from mmdata.errors import DataError
from mmdata.hashing import content_hash, mix_int, shuffled
from mmdata.rows import orders, packing
from mmdata.rows.loader import micro_batches
from mmdata.rows.orders import shuffled_places
from mmdata.rows.stream import RowStream
from tests.data.corpus.toy import ToyCorpus, write_toy

LENGTHS = [(i * i * 7 + i * 13) % 61 for i in range(3000)]  # some are 0
FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")
OPTIONS = {"vocab_size": 1 << 16, "valid_fraction": 0.1, "seed": 5}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    large = ((indexed, "LARGE"), (kept_split, "LARGE_DOCUMENTS"), (orders, "LARGE"), (documents, "LARGE"))
    for module, name in large:
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(token_range, "_SCAN_STEP", 1000)


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it once everything is kept: from then on, working anything out again fails."""

    def fail(*args: object) -> None:
        raise AssertionError("worked out again")

    def forbid() -> None:
        monkeypatch.setattr(IndexedCorpus, "_read_index", fail)
        monkeypatch.setattr(kept_split, "split_documents", fail)
        monkeypatch.setattr(token_range, "_scan_range", fail)
        monkeypatch.setattr(token_range, "scan_tokens", fail)
        monkeypatch.setattr(orders, "shuffled_places", fail)
        monkeypatch.setattr(documents, "_filled", fail)

    return forbid


def token_lists(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [[k % 60_000 for k in range(end - length, end)] for end, length in zip(ends, lengths, strict=True)]


def written(megatron_corpus: Callable[..., Path], lengths: list[int] = LENGTHS, name: str = "pair.v1") -> Path:
    return megatron_corpus([[tokens] for tokens in token_lists(lengths)], np.int32, name)


def stream_of(split: Split, packing: str, cache: ArrayCache | None, row: int = 64, seed: int = 11) -> RowStream:
    chosen = split.kept or split.documents
    return RowStream(
        split.corpus,
        seq_len=row,
        seed=seed,
        packing=packing,
        eod_id=0,
        documents=chosen,
        vocab_size=1 << 16,
        cache=cache,
    )


def equal(a: object, b: object) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("lengths", [LENGTHS, [length + 1 for length in LENGTHS[:500]]], ids=["empty", "full"])
def test_rows_are_the_same_with_a_cache_and_without(
    tmp_path: Path, megatron_corpus: Callable[..., Path], nothing_is_made: Callable[[], None], packing: str,
    lengths: list[int],
) -> None:  # fmt: skip
    source, cache = str(written(megatron_corpus, lengths)), ArrayCache([tmp_path / "cache"])
    plain, kept = open_corpus(source, **OPTIONS), open_corpus(source, **OPTIONS, cache=cache)
    numbers = [0, 1, 5, 40, 300, 1500, 1501, 4000]
    want = [[stream_of(side, packing, None)[i] for i in numbers] for side in plain]
    whole = [stream_of(Split(plain[0].corpus), packing, None)[i] for i in numbers]
    for turn in range(2):
        if turn:
            nothing_is_made()
            kept = open_corpus(source, **OPTIONS, cache=cache)
        for side, side_plain, rows in zip(kept, plain, want, strict=True):
            assert np.array_equal(side.documents, side_plain.documents) and side.kept is not None
            stream = stream_of(side, packing, cache)
            assert stream.num_tokens == stream_of(side_plain, packing, None).num_tokens
            assert all(equal(stream[i], row) for i, row in zip(numbers, rows, strict=True))
        stream = stream_of(Split(kept[0].corpus), packing, cache)
        assert all(equal(stream[i], row) for i, row in zip(numbers, whole, strict=True))
    assert isinstance(kept[0].corpus.doc_lengths.base, np.memmap)
    for side, rows in zip(kept, want, strict=True):
        sent = pickle.dumps(stream_of(side, packing, cache))
        assert len(sent) < 3000 and equal(pickle.loads(sent)[300], rows[4])  # by path, not by content
    batch = next(micro_batches(stream_of(kept[0], packing, cache), [[0, 300]], num_workers=1))
    assert np.array_equal(batch.tokens_BS[1].numpy(), want[0][4].tokens)


@pytest.mark.parametrize(
    ("packing", "part", "digest", "rows"),
    [
        ("concat", False, "2d613e538c21fb77", (1359, 1359)),
        ("concat", True, "699e981692132402", (1164, 1164)),
        ("best_fit", False, "dd1348d34083de92", (1402, 1402)),
        ("best_fit", True, "d1af2fcbfd8eb3fd", (1201, 1201)),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_the_order_of_data_is_the_one_of_the_first_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, part: bool, digest: str, rows: tuple[int, int],
    large: bool,
) -> None:  # fmt: skip
    """Digests of rows made before there was a cache."""
    if large:
        monkeypatch.setattr(orders, "LARGE", 1)
        monkeypatch.setattr(documents, "LARGE", 1)
        monkeypatch.setattr(orders, "PART", 700)
    ends = np.cumsum(LENGTHS)
    toy = [list(range(end - length, end)) for end, length in zip(ends.tolist(), LENGTHS, strict=True)]
    corpus = ToyCorpus(write_toy(tmp_path / "a.toy", toy))
    cache = ArrayCache([tmp_path / "cache"])
    ids = np.array([i for i in range(3000) if i % 7 != 3]) if part else None
    chosen = ids
    if part and large:
        full = ids[corpus.doc_lengths[ids] > 0]
        lengths = corpus.doc_lengths[full]
        chosen = documents.Documents(full, lengths, int(lengths.sum()), {"part": 1})
    stream = RowStream(corpus, seq_len=64, seed=11, packing=packing, eod_id=0, documents=chosen, cache=cache)
    found = hashlib.sha256()
    for i in [*range(40), 700, 1405, 1406, 1407, 1500, 3000, 4500]:
        for name in FIELDS:
            found.update(getattr(stream[i], name).tobytes())
    assert found.hexdigest()[:16] == digest and (stream.rows_per_epoch(0), stream.rows_per_epoch(1)) == rows
    assert (tmp_path / "cache").exists() == large


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_places_are_shuffled_in_parts_as_they_are_at_once(n: int) -> None:
    want = shuffled(np.arange(n), 3, 1, 0)
    for part in (1, 7, 250, 999, 1000, 5000):
        done: list[float] = []
        places = shuffled_places(n, (3, 1, 0), part, done.append) if n // part < 200 else want
        assert np.array_equal(places, want)
        assert not done or (done[-1] == 1 and places.dtype == np.uint32)
        assert n // part >= 200 or len(done) == (-(-n // part) if n > part else 0)  # as many slices as bound the memory


def test_keys_at_the_edges_of_slices_are_each_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices of all keys: documents whose keys are the first and the last of each."""
    second, third = (1 << 64) // 3, (1 << 65) // 3
    first_and_last = [(0, second - 1), (second, third - 1), (third, (1 << 64) - 1)]
    keys = np.array([key for pair in first_and_last for key in pair], dtype=np.uint64)[[3, 0, 5, 2, 4, 1]]
    monkeypatch.setattr(orders, "mix_array", lambda x: keys[x] if x.dtype == np.int64 else x)
    monkeypatch.setattr(orders, "salt_of", lambda *parts: 0)
    assert shuffled_places(6, (3, 1, 0), 2, lambda done: None).tolist() == [1, 5, 3, 0, 4, 2]


@pytest.mark.usefixtures("everything_is_large")
def test_a_resumed_stream_of_best_fit_plans_few_windows(
    tmp_path: Path, megatron_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 16)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 1)
    cache = ArrayCache([tmp_path / "cache"])
    split = Split(IndexedCorpus(written(megatron_corpus), cache))
    looked: list[str] = []
    find = cache.find

    def bounded(name: str, key: dict) -> Entry | None:
        looked.append(name)
        assert len(looked) < 500, "what is kept of windows brings no stream forward"
        return find(name, key)

    monkeypatch.setattr(cache, "find", bounded)
    planned: list[int] = []
    best_fit = packing.best_fit
    monkeypatch.setattr(packing, "best_fit", lambda *args: planned.append(0) or best_fit(*args))
    first = stream_of(split, "best_fit", cache)
    row = first[3000]
    assert len(planned) > 300  # windows of more than two epochs
    planned.clear()
    assert equal(stream_of(split, "best_fit", cache)[3000], row)
    assert len(planned) <= packing.WINDOWS_KEPT + 1
    assert equal(stream_of(split, "best_fit", None)[3000], row)
    other = stream_of(split, "best_fit", cache, row=48)  # other rows have other windows
    assert equal(other[3000], stream_of(split, "best_fit", None, row=48)[3000])


def test_the_order_of_rows_in_windows_stays(
    megatron_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of each window are shuffled by its own number in the epoch: what a resumed run goes on with."""
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 16)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 1)
    stream = stream_of(Split(IndexedCorpus(written(megatron_corpus))), "best_fit", None)
    found = hashlib.sha256(np.concatenate([stream[i].tokens for i in range(3000)]).tobytes())
    assert found.hexdigest()[:16] == "387806b87aed62e8"


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_choices_that_nothing_names_are_not_kept(
    tmp_path: Path, megatron_corpus: Callable[..., Path], packing: str
) -> None:
    """Two choices of as many documents, each by its ids: one's order is never taken for the other's."""
    corpus, cache = IndexedCorpus(written(megatron_corpus, [5, 6] * 40)), ArrayCache([tmp_path / "cache"])
    for first in (0, 1):
        split = Split(corpus, np.arange(first, 80, 2))
        given, plain = (stream_of(split, packing, kept, row=16) for kept in (cache, None))
        assert all(equal(given[i], plain[i]) for i in range(10))
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("everything_is_large")
def test_a_corpus_that_changed_is_read_anew(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    cache = ArrayCache([tmp_path / "cache"])
    before, after = [5, 6, 7] * 30, [5, 7, 6] * 30  # of the same sizes
    source = written(megatron_corpus, before)
    first = open_corpus(str(source), **OPTIONS, cache=cache)[0]
    assert first.corpus.doc_lengths.tolist() == before
    written(megatron_corpus, after)
    train, valid = open_corpus(str(source), **OPTIONS, cache=cache)
    assert train.corpus.doc_lengths.tolist() == after
    want = split_documents(IndexedCorpus(source), 0.1, 5)
    assert not np.array_equal(first.documents, want[0])
    assert np.array_equal(train.documents, want[0]) and np.array_equal(valid.documents, want[1])
    other = open_corpus(str(source), **OPTIONS | {"seed": 6}, cache=cache)
    other_want = split_documents(IndexedCorpus(source), 0.1, 6)[0]
    assert np.array_equal(other[0].documents, other_want) and not np.array_equal(other_want, want[0])
    for seed in (11, 12):  # each order of documents is kept by its seed
        rows = [stream_of(Split(train.corpus), "concat", kept, row=16, seed=seed) for kept in (cache, None)]
        assert all(equal(rows[0][i], rows[1][i]) for i in range(5))


@pytest.mark.usefixtures("everything_is_large")
def test_wrong_corpora_are_refused_with_a_cache_too(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    cache = ArrayCache([tmp_path / "cache"])
    source = written(megatron_corpus)
    for _ in range(2):
        open_corpus(str(source), **OPTIONS, cache=cache)
        with pytest.raises(DataError, match=r"document \d+: token id 59999 is outside 0\.\.59998"):
            open_corpus(str(source), **OPTIONS | {"vocab_size": 59_999}, cache=cache)
    content = bytearray(Path(f"{source}.idx").read_bytes())
    content[34 + 4 * 10] ^= 1  # a length
    Path(f"{source}.idx").write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match="do not follow"):
            open_corpus(str(source), **OPTIONS, cache=cache)


def test_small_corpora_leave_nothing_behind(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    source = written(megatron_corpus)
    cache = ArrayCache([tmp_path / "cache"])
    train, _ = open_corpus(str(source), **OPTIONS, cache=cache)
    stream_of(train, "concat", cache)[0]
    assert not (tmp_path / "cache").exists() and not [path for path in os.listdir(tmp_path) if path.startswith(".")]


def test_hashes_of_documents_are_those_of_each(megatron_corpus: Callable[..., Path]) -> None:
    corpus, done = IndexedCorpus(written(megatron_corpus)), []
    ids = np.flatnonzero(corpus.doc_lengths > 0)[::3]
    want = [mix_int(content_hash(corpus.document(int(i)).tobytes()) ^ mix_int(7)) for i in ids]
    assert document_hashes(corpus, ids, 7, done.append).tolist() == want and done == [1.0]

import itertools
import multiprocessing

import numpy as np
import pytest
import torch

from mmdata.errors import DataError
from mmdata.rows.loader import PackedBatch, collate, micro_batches
from mmdata.rows.mixture import Mixture, floor_sum
from mmdata.rows.stream import RowStream

LENGTHS = [5, 1, 33, 2, 8, 8, 17, 3, 64, 7]


def stream_of(corpus, seed=0, **options):
    return RowStream(corpus, seq_len=16, seed=seed, eod_id=0, **options)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    names = ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS", "cu_seqlens")
    return (a.rows, a.real_tokens) == (b.rows, b.real_tokens) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in names
    )


def test_batch_is_its_rows_flattened(numbered_corpus):
    stream = stream_of(numbered_corpus(LENGTHS), packing="best_fit")
    (batch,) = micro_batches(stream, [[4, 0, 2]])
    rows = [stream[i] for i in (4, 0, 2)]
    assert batch.rows == (4, 0, 2)
    for name, dtype in [("tokens", torch.int64), ("labels", torch.int64), ("loss_mask", torch.bool)]:
        tensor = getattr(batch, f"{name}_BS")
        assert tensor.dtype == dtype and tensor.tolist() == [getattr(row, name).tolist() for row in rows]
    assert batch.position_ids_BS.dtype == torch.int64
    assert batch.position_ids_BS.tolist() == [row.position_ids.tolist() for row in rows]
    want = [0] + [int(c) + 16 * b for b, row in enumerate(rows) for c in row.cu_seqlens[1:]]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist() == want
    assert {0, 16, 32, 48} <= set(want)
    assert batch.max_seqlen == max(np.diff(want)) and isinstance(batch.max_seqlen, int)
    assert batch.real_tokens == tuple(row.real_tokens for row in rows)
    moved = batch.to("cpu")
    assert same(moved, batch) and moved.max_seqlen == batch.max_seqlen


def test_batch_built_by_hand_knows_its_longest_piece():
    x = torch.zeros(1, 8, dtype=torch.int64)
    batch = PackedBatch(x, x, x.bool(), x, torch.tensor([0, 5, 8], dtype=torch.int32), (0,))
    assert batch.max_seqlen == 5


def test_only_a_packing_that_pads_tells_real_tokens(numbered_corpus):
    corpus = numbered_corpus([16, 16, 16, 5])
    (concat,) = micro_batches(stream_of(corpus), [[0, 1]])
    assert concat.real_tokens is None and concat.num_real_tokens == 32
    (full,) = micro_batches(stream_of(numbered_corpus([16, 16]), packing="best_fit"), [[0, 1]])
    assert full.real_tokens == (16, 16)  # full rows too, so that all ranks know the same of the packing
    stream = stream_of(numbered_corpus([12, 7]), packing="best_fit")
    (padded,) = micro_batches(stream, [[0, 1]])
    assert sorted(padded.real_tokens) == [7, 12] and padded.num_real_tokens == 19
    assert (padded.tokens_BS != 0).sum(1).tolist() == list(padded.real_tokens)
    mixed = collate([stream[0], stream_of(corpus)[0]], [0, 1])  # rows that cannot be padded count as full ones
    assert mixed.real_tokens == (padded.real_tokens[0], 16)


def test_any_number_of_workers_gives_the_same(numbered_corpus):
    corpus = numbered_corpus(LENGTHS)
    mixture = Mixture([stream_of(corpus, 1), stream_of(corpus, 2, packing="best_fit")], [3, 1], seed=5)
    lists = [[3 * i, 3 * i + 2] for i in range(12)]
    alone = list(micro_batches(mixture, lists))
    for workers in (1, 2):
        read = list(micro_batches(mixture, lists, num_workers=workers, prefetch=2))
        assert len(read) == len(alone) and all(same(a, b) for a, b in zip(read, alone, strict=True))


def loaders():
    """Processes that are left; workers of other tests' pool live on."""
    return [child for child in multiprocessing.active_children() if not child.name.startswith("pool-")]


def test_endless_lists_are_read_as_needed(numbered_corpus):
    stream = stream_of(numbered_corpus(LENGTHS))
    batches = micro_batches(stream, ([i] for i in itertools.count()), num_workers=1, prefetch=2)
    assert [batch.rows for batch in itertools.islice(batches, 5)] == [(i,) for i in range(5)]
    batches.close()
    assert not loaders()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_through_as_one_line(numbered_corpus, workers):
    stream = stream_of(numbered_corpus(LENGTHS), vocab_size=3)
    with pytest.raises(DataError, match="is outside 0") as caught:
        list(micro_batches(stream, [[0], [1]], num_workers=workers))
    assert "\n" not in str(caught.value) and not loaders()


def test_bad_arguments(numbered_corpus):
    stream = stream_of(numbered_corpus(LENGTHS))
    with pytest.raises(DataError, match="num_workers is -1"):
        next(micro_batches(stream, [[0]], num_workers=-1))
    with pytest.raises(DataError, match="0 rows"):
        next(micro_batches(stream, [[]]))


def test_mixture_keeps_its_proportions_at_every_point(numbered_corpus):
    corpus = numbered_corpus(LENGTHS)
    weights = [0.7, 0.0, 0.25, 0.05]
    mixture = Mixture([stream_of(corpus, seed) for seed in range(4)], weights, seed=9)
    counts = [0] * 4
    for i in range(20_000):
        source, row = mixture.locate(i)
        assert row == counts[source]  # the k-th row from a source is its row k
        counts[source] += 1
        if i % 50 == 0:
            assert all(abs(count - weight * (i + 1)) < 6 for count, weight in zip(counts, weights, strict=True))
    assert counts[1] == 0


def test_mixture_is_pure_and_far_rows_cost_nothing(numbered_corpus):
    corpus = numbered_corpus(LENGTHS)
    make = lambda seed: Mixture([stream_of(corpus, 1), stream_of(corpus, 2)], [2, 1], seed)  # noqa: E731
    far = 10**12 + 7
    source, row = make(1).locate(far)
    assert abs(row - far * [2, 1][source] / 3) < 1000  # weights are rounded to 2^-32
    mixture = make(1)
    near = [mixture.locate(i) for i in range(9000)]
    mixture.locate(far)
    assert [mixture.locate(i) for i in range(0, 9000, 7)] == near[::7]
    other = make(2)
    assert [other.locate(i) for i in range(100)] != near[:100]
    i = next(i for i in range(100) if near[i] == (1, 3))
    assert np.array_equal(mixture[i].tokens, stream_of(corpus, 2)[3].tokens)


def test_floor_sum_equals_the_sum():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, m, a, b = (int(v) for v in rng.integers(0, 50, 4))
        assert floor_sum(n, m + 1, a, b) == sum((a * i + b) // (m + 1) for i in range(n))


def test_bad_mixtures(numbered_corpus):
    stream = stream_of(numbered_corpus(LENGTHS))
    for weights in ([1], [0, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(DataError, match="weight"):
            Mixture([stream, stream], weights, seed=0)
    with pytest.raises(DataError, match="one seq_len"):
        Mixture([stream, RowStream(stream.corpus, seq_len=8, seed=0, eod_id=0)], [1, 1], seed=0)

"""Documents held out: a share of the tokens, whole documents, chosen by content alone."""

import numpy as np
import pytest

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.split import ENOUGH_TOKENS, Split, held_out, held_out_warning, split_documents


def hashes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64) << np.uint64(56)


def chosen(tokens: list[int], fraction: float, order: list[int] | None = None) -> list[int]:
    """Places of the documents held out of those with hashes in their order."""
    places = np.array(order or range(len(tokens)))
    mask = held_out(hashes(*places + 1), np.array(tokens)[places], fraction)
    return sorted(places[mask].tolist())


def test_edges():
    some = hashes(5, 9, 5, 15)
    one = np.ones(4, dtype=np.int64)
    assert held_out(some, one, 0.5).tolist() == [True, False, True, False]  # duplicates stay together
    assert held_out(some, one, 0.01).tolist() == [False, True, False, False]  # at least the smallest
    assert held_out(some, one, 0.999).tolist() == [True, True, True, False]  # at least one to train on
    assert not held_out(some, one, 0.0).any() and not held_out(some[[0, 2]], one[:2], 0.5).any()
    assert held_out(some[:0], one[:0], 0.5).shape == (0,)


def test_the_share_is_one_of_tokens():
    """Documents of very unequal size, as of a corpus where 1% of the documents was 1,455 of 30.6M tokens."""
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.normal(6, 2, size=5000)).astype(np.int64) + 1
    names = rng.integers(0, 1 << 63, size=5000).astype(np.uint64)
    for fraction in (0.001, 0.01, 0.1, 0.5):
        mask = held_out(names, tokens, fraction)
        assert 0.99 * fraction < tokens[mask].sum() / tokens.sum() <= fraction
        order = rng.permutation(5000)
        assert np.array_equal(held_out(names[order], tokens[order], fraction), mask[order])
    first = np.sort(names)[: held_out(names, tokens, 0.01).sum() // 2]
    assert held_out(names, tokens, 0.01)[np.isin(names, first)].mean() > 0.9  # the lowest hashes, but for giants


def test_a_giant_document_is_passed_over():
    assert chosen([1_000_000, 100, 100, 100], 0.01) == [1, 2, 3]
    assert chosen([100, 100, 1_000_000], 0.5) == [0, 1]
    assert chosen([1_000_000, 30, 100], 0.00001) == [1]  # nothing fits: the smallest
    assert chosen([1_000_000], 0.5) == []
    assert chosen([600, 400], 0.5) == [1]


def test_one_by_one_gives_the_same():
    rng = np.random.default_rng(1)
    for _ in range(200):
        tokens = rng.integers(1, 50, size=rng.integers(2, 40))
        fraction = float(rng.uniform(0, 1))
        room, want = int(fraction * tokens.sum()), []
        for place, size in enumerate(tokens):
            if size <= room:
                want.append(place)
                room -= size
        assert chosen(tokens.tolist(), fraction) == (want or [int(np.argmin(tokens))])


def test_too_little_is_said():
    assert held_out_warning(ENOUGH_TOKENS, 1 << 30) is None
    line = held_out_warning(1455, 30_600_000)
    assert line.startswith("held out: 1,455 of 30,600,000 tokens (0.00%), too few") and "\n" not in line
    assert "nothing to measure" in held_out_warning(0, 10)


def test_split_at_training_time_is_by_tokens_too(megatron_corpus):
    documents = [[[i % 97] * (1 + i % 7), [i % 89, 3]] for i in range(400)] + [[[7] * 3000]]
    corpus = IndexedCorpus(megatron_corpus(documents))
    train, valid = split_documents(corpus, 0.05)
    tokens = Split(corpus, valid).num_tokens
    assert 0.049 < tokens / corpus.num_tokens <= 0.05 and 400 in train
    assert Split(corpus, train).num_tokens + tokens == corpus.num_tokens == Split(corpus).num_tokens


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_workers_do_not_matter_to_the_choice(fraction):
    tokens = np.arange(1, 1001)
    names = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    halves = np.concatenate([np.arange(500, 1000), np.arange(500)])
    assert np.array_equal(held_out(names, tokens, fraction)[halves], held_out(names[halves], tokens[halves], fraction))

"""Mixtures by tokens, walked row by row and token by token: shares, interpolation, repetition, labels, purity."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmdata.corpus.buckets import in_bucket
from mmdata.corpus.documents import choose
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.errors import DataError
from mmdata.rows import token_mixture
from mmdata.rows.loader import micro_batches
from mmdata.rows.share_schedule import Segment, ShareSchedule
from mmdata.rows.token_mixture import Component, TokenMixture
from mmdata.rows.window_layout import lay_best_fit, lay_end_to_end

S, EOD = 64, 0
LIMITS = [(0, 30), (30, 120), (120, None)]
RAMP, MAIN, LAST = 40, 150, 60  # rows of the segments; then without end
BEFORE = (Fraction(1), Fraction(0), Fraction(0), Fraction(0), Fraction(0))
OWN = (Fraction(0), Fraction(3, 10), Fraction(7, 20), Fraction(7, 20), Fraction(0))
LATE = (*(share * Fraction(9, 10) for share in OWN[:4]), Fraction(1, 10))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[IndexedCorpus]:
    """Two corpora of documents of 1 to 500 tokens in which every token is unique, over both."""
    from mmdata.corpus.writer import CorpusWriter

    rng, following, made = np.random.default_rng(3), 1, []
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("text", 100), ("answers", 10)):
        with CorpusWriter(folder / name, np.dtype(np.int32)) as writer:
            for length in np.exp(rng.uniform(0, np.log(500), count)).astype(int):
                writer.add(np.arange(following, following + length, dtype=np.int32))
                following += length
        made.append(IndexedCorpus(folder / name))
    return made


def mixture_of(corpora: list[IndexedCorpus], packing: str = "concat", seed: int = 5, **options) -> TokenMixture:
    """All of the first corpus, its three buckets, and the second corpus, through the three segments."""
    text, answers = corpora
    every = choose(text, None)
    parts = [Component(text, every), *(Component(text, in_bucket(text, every, *limits)) for limits in LIMITS)]
    parts.append(Component(answers, choose(answers, None)))
    segments = [
        Segment(RAMP, BEFORE, OWN),
        Segment(MAIN, OWN, OWN),
        Segment(LAST, LATE, LATE),
        Segment(None, LATE, LATE),
    ]
    return TokenMixture(parts, segments, seq_len=S, seed=seed, packing=packing, eod_id=EOD, **options)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 16 rows, so that a short walk goes through many."""
    monkeypatch.setattr(token_mixture, "WINDOW_ROWS", 16)
    monkeypatch.setattr(token_mixture, "WINDOW_DOCUMENTS", 1)


def naive_share(component: int, row: float) -> float:
    """Share at a place of the stream, by the definition."""
    before, own, late = (float(shares[component]) for shares in (BEFORE, OWN, LATE))
    if row < RAMP:
        return before + (own - before) * row / RAMP
    return own if row < RAMP + MAIN else late


def naive_tokens(component: int, rows: int, row_tokens: float) -> float:
    """Integral of the share over the first rows: the middle of each row says it exactly, as no edge is inside one."""
    return sum(naive_share(component, row + 0.5) for row in range(rows)) * row_tokens


class Walk:
    """What the rows of a stream hold, token by token."""

    def __init__(self, corpora: list[IndexedCorpus], mixture: TokenMixture, rows: int) -> None:
        following = {}  # of each token the next of its document, and whether it is the last
        for corpus in corpora:
            for d in range(corpus.num_documents):
                tokens = corpus.document(d).tolist()
                following |= dict(zip(tokens, [*tokens[1:], None], strict=True))
        self.counts = np.zeros((rows + 1, len(mixture.components)), dtype=np.int64)
        self.seen = [Counter() for _ in mixture.components]
        self.windows: list[tuple[int, list[Counter]]] = []
        self.padding = 0
        for i in range(rows):
            if mixture.schedule.window(i).first_row == i:
                self.windows.append((i, [Counter(seen) for seen in self.seen]))
            row, (components, pieces) = mixture[i], mixture.pieces(i)
            self.counts[i + 1] = self.counts[i]
            real = row.real_tokens if row.real_tokens is not None else S
            assert 1 <= real <= S and int(pieces.lengths.sum()) == real
            edges = [0, *np.cumsum(pieces.lengths).tolist()]
            assert row.cu_seqlens.tolist() == edges + [S] * (real < S)
            for component, start, stop in zip(components.tolist(), edges[:-1], edges[1:], strict=True):
                tokens = row.tokens[start:stop].tolist()
                self.seen[component].update(tokens)
                self.counts[i + 1, component] += stop - start
                assert row.position_ids[start:stop].tolist() == list(range(stop - start))
                for k, token in enumerate(tokens):
                    last = following[token] is None
                    assert k == 0 or following[tokens[k - 1]] == token  # one document, in its order
                    assert row.labels[start + k] == (EOD if last else following[token])
                    assert row.loss_mask[start + k] == (not last)
            assert (row.tokens[real:] == EOD).all() and not row.loss_mask[real:].any()
            self.padding += S - real


ROWS = RAMP + MAIN + LAST + 50


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_shares_repetition_and_labels_over_a_whole_walk(corpora: list[IndexedCorpus], packing: str) -> None:
    mixture = mixture_of(corpora, packing)
    walk = Walk(corpora, mixture, ROWS)
    row_tokens = S if packing == "concat" else S * (1 - 1 / 32)
    assert walk.padding == (0 if packing == "concat" else pytest.approx(ROWS * S / 32, abs=S))
    want = np.array([[naive_tokens(c, rows, row_tokens) for c in range(5)] for rows in range(ROWS + 1)])
    off = walk.counts - want
    ends = [first for first, _ in walk.windows]
    assert {0, RAMP, RAMP + MAIN, RAMP + MAIN + LAST} <= set(ends) and len(ends) > 25
    assert np.abs(off[ends]).max() < 5  # tokens, of rounding: exact at every window's end, however far
    assert (off.max(axis=0) - off.min(axis=0)).max() < 3 * S  # every stretch whatever: three rows at most
    assert walk.counts[RAMP + MAIN, 4] == 0 and walk.counts[RAMP, 0] == walk.counts[-1, 0]
    for first, seen in walk.windows:  # no token is read again before all of its component have been
        for component, counts in zip(mixture.components, seen, strict=True):
            times = Counter(counts.values())
            unread = component.documents.num_tokens - len(counts)
            epochs = max(times, default=0)
            assert set(times) <= {epochs, epochs - 1} and (unread == 0 or epochs <= 1), first
    assert max(walk.seen[1].values()) > 2  # some epochs were walked


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_are_pure_and_far_rows_cost_nothing(corpora: list[IndexedCorpus], packing: str) -> None:
    mixture, rows = mixture_of(corpora, packing), [0, 300, 17, 10**12, 41, 17]
    found = [mixture[i].tokens.tolist() for i in rows]
    fresh = pickle.loads(pickle.dumps(mixture_of(corpora, packing)))
    assert [fresh[i].tokens.tolist() for i in reversed(rows)] == found[::-1]
    assert mixture_of(corpora, packing, seed=6)[0].tokens.tolist() != found[0]
    lists = [[3 * i, 3 * i + 2] for i in range(6)]
    alone = list(micro_batches(mixture, lists))
    read = list(micro_batches(mixture, lists, num_workers=1))
    assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(alone, read, strict=True))
    with pytest.raises(IndexError):
        mixture[-1]


def test_a_bucket_is_the_documents_of_its_lengths(corpora: list[IndexedCorpus]) -> None:
    text = corpora[0]
    some = choose(text, np.arange(0, 100, 2))
    for low, below in LIMITS:
        want = [
            d for d in range(0, 100, 2) if low <= text.doc_lengths[d] and (below is None or text.doc_lengths[d] < below)
        ]
        found = in_bucket(text, some, low, below)
        assert found.id_of(np.arange(len(found))).tolist() == want and len(want) > 5
        assert found.lengths.tolist() == [text.doc_lengths[d] for d in want]
    assert in_bucket(text, some, 0, None) is some
    limit = int(text.doc_lengths[0])  # a document of this very length belongs to the bucket from it on
    for found, inside in ((in_bucket(text, some, 0, limit), False), (in_bucket(text, some, limit, None), True)):
        assert (0 in found.id_of(np.arange(len(found)))) is inside


def test_layouts_hold_every_token_once_and_cut_little() -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        rows, row = int(rng.integers(1, 30)), int(rng.integers(5, 200))
        lengths = np.exp(rng.uniform(0, np.log(3 * row), 6 * rows + 3)).astype(np.int64)
        total = row * rows
        full = np.append(lengths[np.cumsum(lengths) < total], 0)
        full[-1] = total - full.sum()
        for lay, given in ((lay_end_to_end, full), (lay_best_fit, full), (lay_best_fit, full[:-1])):
            parts = lay(given, row, rows)
            held = np.bincount(parts.rows, parts.lengths, rows)
            assert held.max() <= row and len(held) == rows and parts.lengths.min() >= 1
            for piece, length in enumerate(given.tolist()):
                mine = np.flatnonzero(parts.pieces == piece)
                spans = sorted(zip(parts.offsets[mine].tolist(), parts.lengths[mine].tolist(), strict=True))
                assert [a for a, _ in spans] == [0, *np.cumsum([n for _, n in spans])[:-1].tolist()]
                assert sum(n for _, n in spans) == length, trial
    assert set(lay_best_fit(np.full(8, 10), 30, 3).rows.tolist()) == {0, 1, 2}
    parts = lay_best_fit(np.array([60] * 4 + [15]), 100, 3)  # a fourth row is dissolved
    assert sorted(parts.lengths.tolist()) == [15, 20, 40, 60, 60, 60]
    parts = lay_best_fit(np.array([75, 60, 60, 55, 50]), 100, 3)  # two are, and no token of a gap is lost
    assert sorted(parts.lengths.tolist()) == [10, 15, 40, 40, 60, 60, 75]
    with pytest.raises(DataError, match="do not fit"):
        lay_best_fit(np.array([60, 60]), 100, 1)


def test_bad_shares_and_components_are_refused(corpora: list[IndexedCorpus]) -> None:
    third, half = Fraction(1, 3), Fraction(1, 2)
    for segments in (
        [Segment(None, (half, third), (half, third))],
        [Segment(None, (half * 3, -half), (half * 3, -half))],
        [Segment(5, (half, half), (half, half))],
        [Segment(None, (half, half), (third, 2 * third))],
    ):
        with pytest.raises(DataError):
            ShareSchedule(segments, 256, S)
    text, every = corpora[0], choose(corpora[0], None)
    with pytest.raises(DataError, match="does not have"):
        one = [Segment(None, (Fraction(1),), (Fraction(1),))]
        TokenMixture([Component(text, in_bucket(text, every, 9999, None))], one, seq_len=S, seed=0, eod_id=0)

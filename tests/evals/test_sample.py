"""Samples: exact lengths, needles at their depths, answers that stand in the text, the same draws again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.split import Split
from mmdata.errors import DataError
from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.insert import BREAK_SHARE
from mmtrain.evals.sample import Cell, Sample, SampleBuilder
from mmtrain.evals.tasks import TASKS, spread
from mmtrain.model.loss import IGNORE
from tests.evals.text import TOKENIZER, VOCAB, answers, builder, split

DEPTHS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleBuilder:
    return builder(tmp_path_factory.mktemp("text"))


def asked(sample: Sample) -> np.ndarray:
    """Places of the answers' tokens."""
    return np.flatnonzero(sample.labels_T != IGNORE) + 1


def test_kinds_are_those_of_the_options() -> None:
    assert tuple(TASKS) == NEEDLE_KINDS


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("length", [1023, 4096])
def test_a_sample_has_exactly_its_tokens_and_ends_with_an_answer(made: SampleBuilder, kind: str, length: int) -> None:
    for depth in DEPTHS:
        sample = made.build(Cell(kind, length, depth), 0)
        places = asked(sample)
        assert sample.tokens_T.shape == sample.labels_T.shape == (length,) and places[-1] == length - 1
        assert (sample.labels_T[places - 1] == sample.tokens_T[places]).all()
        assert TOKENIZER.eod_id not in sample.tokens_T  # one document


@pytest.mark.parametrize("kind", TASKS)
def test_the_answers_are_found_in_the_text(made: SampleBuilder, kind: str) -> None:
    for index, depth in enumerate(DEPTHS):
        sample = made.build(Cell(kind, 1500, depth), index)
        places = asked(sample)
        found = answers(sample.tokens_T[: places[0]].tolist())
        wanted = {"single": 1, "multi": 4, "multi_key": 1, "variable_tracking": 5}[kind]
        assert len(found) == wanted
        assert TOKENIZER.decode(sample.tokens_T[places].tolist()) == "".join(found)


@pytest.mark.parametrize("kind", TASKS)
def test_needles_lie_at_their_depths(made: SampleBuilder, kind: str) -> None:
    length = 8192
    for depth in DEPTHS:
        cell = Cell(kind, length, depth)
        sample, room = made.build(cell, 0), length - made.overhead(cell, 0)
        first = sample.needles[0] / room
        others = made.overhead(cell, 0) / room  # of other needles before it
        assert depth - 1 / BREAK_SHARE - 1e-3 <= first <= depth + 1 / BREAK_SHARE + others
        for place in sample.needles:
            assert TOKENIZER.decode(sample.tokens_T[place:][:4].tolist()) in ("\nThe", "\nVAR")
    single = made.build(Cell("single", length, 1.0), 0)
    assert b"number is:" in bytes(single.tokens_T[single.needles[0] :][:60].tolist())
    assert made.build(Cell("single", length, 0.0), 0).needles == (0,)
    assert spread(0.5, 4) == [0.5, 0.625, 0.75, 0.875] and spread(1.0, 2) == [1.0, 1.0]


def test_a_chain_is_told_in_order(made: SampleBuilder) -> None:
    for depth in DEPTHS:
        sample = made.build(Cell("variable_tracking", 4096, depth), 1)
        for chain in (sample.needles[:5], sample.needles[5:]):
            assert all(one < next_one for one, next_one in pairwise(chain))


def test_a_needle_goes_to_the_end_of_a_sentence_that_is_near(made: SampleBuilder) -> None:
    moved = 0
    for index in range(10):
        sample = made.build(Cell("single", 20_000, 0.5), index)
        moved += sample.tokens_T[sample.needles[0] - 1] in (*b".", *b"\n")
    assert moved == 10


def test_samples_are_a_function_of_seed_place_and_index(made: SampleBuilder, tmp_path: Path) -> None:
    cell = Cell("multi_key", 2000, 0.5)
    again, other_seed = builder(tmp_path), builder(tmp_path, seed=1)
    base = made.build(cell, 3).tokens_T
    made.build(cell, 0)
    assert (again.build(cell, 3).tokens_T == base).all()
    others = [made.build(cell, 4), made.build(cell._replace(depth=0.25), 3), other_seed.build(cell, 3)]
    assert all((other.tokens_T != base).any() for other in others)


def test_text_repeats_where_it_is_too_short_and_the_sample_says_so(made: SampleBuilder) -> None:
    text = made.haystack.num_tokens
    assert made.build(Cell("single", text // 2, 0.5), 0).laps < 1
    sample = made.build(Cell("single", 3 * text, 0.0), 0)
    assert 2.5 < sample.laps < 3
    begin = sample.needles[0] + 60
    body = sample.tokens_T[begin : begin + 2 * text]
    assert (body[:text] == body[text:]).all() and len(set(map(bytes, np.array_split(body[:text], 4)))) == 4


def test_the_ring_holds_every_token_of_the_documents_in_order(tmp_path: Path) -> None:
    whole = split(tmp_path)
    chosen = Split(whole.corpus, np.arange(0, 40, 2))
    for held, ids in ((whole, range(40)), (chosen, range(0, 40, 2))):
        haystack = Haystack(held, "x", TOKENIZER, VOCAB)
        wanted = np.concatenate([whole.corpus.document(i) for i in ids])
        wanted[wanted == TOKENIZER.eod_id] = ord("\n")
        rings = {tuple(np.roll(wanted, -start)) for start in np.flatnonzero(np.roll(wanted, 1) == ord("\n"))}
        for seed in range(8):
            read = haystack.read(haystack.num_tokens, np.random.default_rng(seed))
            assert tuple(read) in rings
            assert (haystack.read(50, np.random.default_rng(seed)) == read[:50]).all()


def test_no_held_out_text_and_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for held in (None, Split(split(tmp_path).corpus, np.empty(0, dtype=np.int64))):
        with pytest.raises(ConfigError, match="corpus has no held-out part"):
            Haystack(held, "corpus", TOKENIZER, VOCAB)
    haystack = Haystack(split(tmp_path), "x", TOKENIZER, 100)
    with pytest.raises(DataError, match=r"outside 0\.\.99"):
        haystack.read(500, np.random.default_rng(0))


def test_too_few_tokens_and_a_tokenizer_that_blurs_are_refused(made: SampleBuilder) -> None:
    cell = Cell("multi", 300, 0.5)
    with pytest.raises(ValueError, match="tokens more are needed"):
        made.build(cell, 0)
    needed = made.overhead(cell._replace(length=600), 0)
    smallest = Cell("single", made.overhead(Cell("single", 600, 0.5), 0) + 60, 0.5)
    assert 300 < needed < 600 and len(made.build(smallest, 0).tokens_T) == smallest.length
    blurred = type("Blurred", (), {"encode": lambda self, text: [0]})()
    with pytest.raises(ConfigError, match="does not tell"):
        SampleBuilder(made.haystack, blurred, 0)

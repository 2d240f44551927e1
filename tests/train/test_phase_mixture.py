"""Mixtures of phases by length of document, over a simulated stage, against shares worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mmdata.corpus.writer import CorpusWriter
from mmtrain.config import BatchStep, BucketConfig, DataConfig, LrSegment, PhaseConfig, SourceConfig, StageConfig
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import RunPlan, rank_rows, scaled_phases
from mmtrain.train.epochs import tokens_by_phase
from mmtrain.train.inputs import RunInputs
from mmtrain.train.phase_mixture import Part
from tests.train.test_stage_warnings import CONFIGS

S = 32
VOCAB = 257


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Corpora whose tokens tell what they are: `web` of short and medium documents, `books` of all, `qa`.

    A document of n tokens is n times one token: 1 to 3 by length (below 16, below 64, more), plus 10 for books, or 30.
    """
    rng, folder, paths = np.random.default_rng(1), tmp_path_factory.mktemp("lengths"), {}
    for name, mark, longest, count in (("web", 0, 60, 300), ("books", 10, 300, 120), ("qa", 30, 200, 40)):
        with CorpusWriter(folder / name, np.dtype(np.int32)) as writer:
            for length in np.exp(rng.uniform(0, np.log(longest), count)).astype(int):
                writer.add(np.full(length, 30 if name == "qa" else mark + bucket_of(length), dtype=np.int32))
        paths[name] = str(folder / name)
    return paths


def bucket_of(length: int) -> int:
    return 1 + (length >= 16) + (length >= 64)


def buckets(*shares: float) -> list[BucketConfig]:
    limits = (Count(16), Count(64), None)
    pairs = zip(("short", "medium", "long"), shares, limits, strict=True)
    return [BucketConfig(name, share, below) for name, share, below in pairs]


def phase(name: str, rows: int, **more) -> PhaseConfig:
    batch, lr = [BatchStep(Count(0), Count(4 * S))], [LrSegment("constant", Count(1), 1.0)]
    return PhaseConfig(name, Count(S), 1e4, Count(rows * S), batch, lr, **more)


def data_of(corpora: dict[str, str], **more) -> DataConfig:
    sources = [SourceConfig(corpora["web"], 3.0), SourceConfig(corpora["books"], 1.0)]
    return DataConfig(sources=sources, tokenizer="bytes", valid_fraction=0.0, **more)


def stage_of(**more) -> list[PhaseConfig]:
    changing = dict(transition=0.25, long_share=0.1, long_last=0.2) | more
    return [
        phase("plain", 40),
        phase("medium", 400, buckets=buckets(0.3, 0.7, 0.0), **changing),
        phase("long", 400, buckets=buckets(0.3, 0.3, 0.4), **changing),
    ]


def tokens_of(inputs: RunInputs, index: int, rows: int) -> np.ndarray:
    """Tokens of each kind in each row, int64[rows, 40], padding left out."""
    stream, found = inputs.train_stream(index), np.zeros((rows, 40), dtype=np.int64)
    for i in range(rows):
        row = stream[i]
        found[i] = np.bincount(row.tokens[: row.real_tokens], minlength=40)[:40]
    return found


# By hand: short text is 3 parts web and 1 part books, and so is medium; books alone have long documents.
MEDIUM = {1: 0.225, 11: 0.075, 2: 0.525, 12: 0.175}
LONG = {1: 0.225, 11: 0.075, 2: 0.225, 12: 0.075, 13: 0.4}


def with_answers(shares: dict[int, float]) -> dict[int, float]:
    return {kind: share * 0.9 for kind, share in shares.items()} | {30: 0.1}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_stage_holds_the_shares_that_its_phases_name(corpora: dict[str, str], packing: str) -> None:
    data = data_of(corpora, packing=packing, long_sources=[SourceConfig(corpora["qa"])])
    inputs = RunInputs(data, stage_of(), VOCAB)
    for index, before, own in ((1, None, MEDIUM), (2, with_answers(MEDIUM), LONG)):
        schedule = inputs.train_stream(index).schedule
        padding = S / (2 * schedule.window_rows) if packing == "best_fit" else 0.0  # of a row
        rows = int(np.ceil(400 * S / (S - padding)))
        last, first = rows - rows // 5, 0 if before else 100  # the first phase begins with documents as they come
        held = tokens_of(inputs, index, rows)
        for kind in range(40):
            target = np.full(rows, own.get(kind, 0.0))
            target[last:] = with_answers(own).get(kind, 0.0)
            middle = (np.arange(100) + 0.5) / 100
            target[:100] = (before or {}).get(kind, 0.0) * (1 - middle) + own.get(kind, 0.0) * middle
            off = np.cumsum((held[:, kind] - target * (S - padding))[first:])
            assert off.max() - off.min() < 2.5 * S, (index, kind)  # every stretch, and no drift
            assert abs(off[last - 1 - first]) < 12, (index, kind)  # tokens, of rounding: exact where a segment ends
        assert held[:last, 30].sum() == (0 if index == 1 else pytest.approx(0.1 * 50 * S, abs=4))
        assert held[last:, 30].sum() == pytest.approx(0.1 * 80 * S, abs=2 * S)


def test_a_phase_without_the_new_options_is_what_it_was(corpora: dict[str, str]) -> None:
    from mmdata.rows.mixture import Mixture

    inputs = RunInputs(data_of(corpora), [phase("plain", 40), *stage_of()[1:]], VOCAB)
    assert isinstance(inputs.train_stream(0), Mixture)
    same = phase("same", 40, transition=0.5, long_share=0.1)  # nothing to go over from, and no long source
    assert isinstance(RunInputs(data_of(corpora), [same], VOCAB).train_stream(0), Mixture)


def test_rows_do_not_depend_on_ranks_or_on_where_a_launch_begins(corpora: dict[str, str]) -> None:
    data = data_of(corpora, long_sources=[SourceConfig(corpora["qa"])])
    stream = RunInputs(data, stage_of(), VOCAB).train_stream(2)
    whole = [stream[i].tokens.tolist() for i in range(0, 400)]
    for ranks, micro in ((2, 1), (4, 2)):
        fresh = RunInputs(data, stage_of(), VOCAB).train_stream(2)  # a launch from row 200 on, on other ranks
        for rank in range(ranks):
            reads = rank_rows(200, rank, ranks, micro)
            for numbers in (next(reads) for _ in range(5)):
                assert [fresh[i].tokens.tolist() for i in numbers] == [whole[i] for i in numbers]


def test_epochs_and_lines_follow_the_mixture(corpora: dict[str, str]) -> None:
    data = data_of(corpora, long_sources=[SourceConfig(corpora["qa"], max_epochs=0.05)], max_epochs=0.2)
    inputs = RunInputs(data, stage_of(), VOCAB)
    tokens = tokens_by_phase(RunPlan(inputs.phases, 1, 1))
    counted = {part: 0.0 for part in ("qa", "long")}
    for use in inputs.epochs(tokens):
        if use.path == corpora["qa"]:
            counted["qa"] += use.consumed
        if use.from_tokens == 64:
            counted["long"] += use.consumed
    rows = [tokens_of(inputs, index, 400) for index in (1, 2)]
    assert counted["qa"] == pytest.approx(sum(float(held[:, 30].sum()) for held in rows), abs=2 * S)
    assert counted["long"] == pytest.approx(float(rows[1][:, 13].sum()), abs=2 * S)
    lines = inputs.header_lines(tokens)
    long = next(line for line in lines if line.startswith("mixture of long: 0.225 "))
    assert "reached over its first 25% from the end of medium; in its last 20%, 10% are of data.long_sources" in long
    assert any("(documents of 64 tokens or more), more than data.max_epochs=0.2, in long" in line for line in lines)
    (warned,) = [line for line in lines if "data.long_sources[0].max_epochs=0.05" in line]
    assert warned.startswith("warning: data.long_sources[0].path=")
    inputs.check_epochs(tokens)  # limits only warn, unless they are strict
    strict = RunInputs(data_of(corpora, max_epochs=0.2, strict_epochs=True), stage_of(), VOCAB)
    with pytest.raises(ConfigError, match="documents of 64 tokens or more") as refused:
        strict.check_epochs(tokens)
    assert "\n" not in str(refused.value)
    assert "long_share=0.1: left out, as data.long_sources is empty" in "".join(strict.header_lines(tokens))


def test_buckets_without_documents_are_refused_for_all_phases_at_once(corpora: dict[str, str]) -> None:
    data = DataConfig(path=corpora["web"], tokenizer="bytes", valid_fraction=0.0)
    with pytest.raises(ConfigError) as refused:
        RunInputs(data, [*stage_of(), phase("more", 9, buckets=buckets(0, 0, 1))], VOCAB)
    told = str(refused.value)
    assert told.startswith("stage.phases[2].buckets[2].share=0.4: no training document of ") and "\n" not in told
    assert "is of bucket long (the longest documents); stage" in told
    assert "; stage.phases[3].buckets[2].share=1: no training document" in told
    only = [SourceConfig(corpora["books"], buckets=["long"]), SourceConfig(corpora["web"], buckets=["short", "medium"])]
    mixture = RunInputs(data_of(corpora), [phase("a", 9, buckets=buckets(1, 1, 2), sources=only)], VOCAB)
    parts = mixture._rows.mixtures[0].own
    web, books = corpora["web"], corpora["books"]
    assert parts == {
        Part(web, 0, 16): Fraction(1, 4),
        Part(web, 16, 64): Fraction(1, 4),
        Part(books, 64): Fraction(1, 2),
    }
    only[1].buckets = ["long"]
    with pytest.raises(ConfigError, match=r"stage.phases\[0\].sources\[1\].buckets=.*no training document of .*web"):
        RunInputs(data_of(corpora), [phase("a", 9, buckets=buckets(0, 0, 1), sources=only)], VOCAB)
    named = data_of(corpora)
    named.sources[0].buckets = ["sort"]
    with pytest.raises(ConfigError, match=r"data.sources\[0\].buckets=sort: not a known choice; did you mean 'short'"):
        RunInputs(named, stage_of(), VOCAB)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(buckets=buckets(0, 0, 0)), r"buckets=\[0, 0, 0\]: no bucket has a share"),
        (dict(buckets=buckets(1, 1, 1)[:2]), "`below` must increase"),
        (dict(buckets=[BucketConfig("a", 1.0), BucketConfig("b", 1.0)]), "`below` must increase"),
        (dict(buckets=[BucketConfig("a", 1.0, Count(5)), BucketConfig("a", 1.0)]), "names must differ"),
        (dict(transition=0.9, long_share=0.1), "transition=0.9: the transition must end before"),
        (dict(sources=[SourceConfig("x", buckets=["long"])]), "buckets=long: not a known choice"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        phase("p", 10, **change).validate("stage.phases[0]")


def test_scale_shrinks_the_limits_of_buckets_with_the_rows() -> None:
    stage = compose(["stage=long_ctx", "run.name=a", "data.path=b", "stage.scale=1/1024"], CONFIGS).stage
    found = [[(bucket.name, bucket.share, bucket.below) for bucket in made.buckets] for made in scaled_phases(stage)]
    table = [(0.30, 0.70, 0.00), (0.35, 0.35, 0.30), (0.30, 0.30, 0.40)]  # MiniMax-01 Table 6
    names, limits = ("short", "medium", "long"), (32, 128, None)
    assert found == [list(zip(names, shares, limits, strict=True)) for shares in table]
    assert [(made.long_share, made.long_last) for made in stage.phases] == [(0.1, 0.2)] * 3
    with pytest.raises(ConfigError, match="buckets"):
        scaled_phases(StageConfig("s", stage.phases, scale=1e-5))

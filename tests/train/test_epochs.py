"""Epochs of each corpus, and the warnings on too many of them and too little held-out text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config import BatchStep, DataConfig, LrSegment, PhaseConfig, SourceConfig
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import RunPlan
from mmtrain.train.epochs import (
    SourceUse,
    check_epochs,
    epoch_lines,
    epoch_warnings,
    held_out_warning,
    readings,
    shared_out,
    tokens_by_phase,
)
from mmtrain.train.inputs import RunInputs
from tests.train.test_inputs import megatron, prepared

__all__ = ["megatron", "prepared"]  # fixtures


def phase(name: str, tokens: int, sources: list[SourceConfig] | None = None) -> PhaseConfig:
    batch, lr = [BatchStep(Count(0), Count(64))], [LrSegment("constant", Count(1), 1.0)]
    return PhaseConfig(name, Count(16), 1e4, Count(tokens), batch, lr, sources)


def use(phase: int, corpus: str, consumed: float, tokens: int = 1000, **more) -> SourceUse:
    return SourceUse(phase, "data.path", f"path/{corpus}", corpus, consumed, tokens, **more)


def test_tokens_of_each_phase_are_those_of_its_steps() -> None:
    plan = RunPlan([phase("a", 1000), phase("b", 100)], 1, 1)  # 16 steps and 2, of 64 tokens
    assert tokens_by_phase(plan) == [1024, 128] == tokens_by_phase(plan, 1000)
    assert [tokens_by_phase(plan, last) for last in (0, 3, 16, 17)] == [[0, 0], [192, 0], [1024, 0], [1024, 64]]


def test_a_mixture_s_tokens_are_shared_out_by_weight() -> None:
    assert shared_out(1000, [3.0, 1.0]) == [750.0, 250.0] and shared_out(7 * 10**12, [0.1, 0.2, 0.7])[2] < 7e12 * 0.71
    assert sum(shared_out(10**13, [0.1, 0.2, 0.7])) == pytest.approx(1e13, rel=1e-15)


def test_a_corpus_of_several_phases_adds_up() -> None:
    uses = [use(0, "a", 2500), use(0, "b", 400), use(1, "a", 2000), use(1, "c", 0)]
    assert epoch_lines(uses, ["first", "second"]) == [
        "corpus path/a: 4.5 epochs, 4,500 of its 1,000 training tokens (first 2.5, second 2)",
        "corpus path/b: 0.4 epochs, 400 of its 1,000 training tokens",
    ]
    names = ["first", "second"]
    (line,) = epoch_warnings([replace(one, limit=4.0) for one in uses], names)
    assert "data.path=path/a is read 4.5 times over, more than data.max_epochs=4, in second: " in line
    assert not epoch_warnings([replace(one, limit=4.5) for one in uses], names) and not epoch_warnings(uses, names)
    assert "614 epochs, 982,400 of" in epoch_lines([use(0, "a", 982_400, 1600)], ["p"])[0]


def test_documents_of_a_bucket_count_for_themselves() -> None:
    """Every document's own epochs, by hand: phase 0 reads all, phase 1 by buckets, phase 2 by other buckets."""
    uses = [
        use(0, "a", 500, 1000),
        use(1, "a", 300, 600, below=64), use(1, "a", 800, 400, from_tokens=64),
        use(2, "a", 100, 100, from_tokens=256), use(2, "a", 0, 900, below=256),
    ]  # fmt: skip
    assert [(one.lengths, one.epochs) for one in readings(uses)] == [
        ("documents below 64 tokens", 1.0),
        ("documents of 64 to 255 tokens", 2.5),
        ("documents of 256 tokens or more", 3.5),
    ]
    assert epoch_lines(uses, ["x", "y", "z"])[1] == (
        "corpus path/a, documents of 64 to 255 tokens: 2.5 epochs (x 0.5, y 2)"
    )
    twice = [use(0, "a", 500, 1000), use(0, "a", 300, 600, below=64)]  # in a transition of one phase
    assert epoch_lines(twice, ["x"])[0] == "corpus path/a, documents below 64 tokens: 1 epochs (x 1)"
    limited = [replace(one, limit=3.0, limit_option="data.sources[0].max_epochs") for one in uses]
    (line,) = epoch_warnings(limited, ["x", "y", "z"])
    assert "3.5 times over (documents of 256 tokens or more), more than data.sources[0].max_epochs=3, in z" in line
    both = [*limited, use(0, "b", 5000, 1000, limit=4.0)]
    with pytest.raises(ConfigError) as refused:
        check_epochs(both)
    told = str(refused.value)
    assert told.startswith("data.path=path/a: is read 3.5 times over") and "\n" not in told
    assert "data.path=path/b is read 5 times over, more than data.max_epochs=4" in told and "strict_epochs" in told
    check_epochs([replace(one, limit=3.5) for one in uses])


def test_epochs_of_a_run_follow_from_weights_and_phases(prepared: Path, megatron: Path) -> None:
    mixed = [SourceConfig(str(prepared), 3.0), SourceConfig(f"{megatron}.bin", 1.0), SourceConfig(str(megatron), 1.0)]
    phases = [phase("a", 1000), phase("b", 1000, mixed)]
    data = DataConfig(path=str(prepared), tokenizer="bytes", valid_fraction=0.0, max_epochs=0.47)
    inputs = RunInputs(data, phases, 257)
    uses = inputs.epochs(tokens_by_phase(RunPlan(phases, 1, 1)))
    tokens = inputs.train_stream(0).num_tokens
    assert [(u.phase, u.option) for u in uses] == [
        (0, "data.path"), *[(1, f"stage.phases[1].sources[{j}].path") for j in range(3)]
    ]  # fmt: skip
    assert [u.consumed for u in uses] == [1024, 614.4, 204.8, 204.8]
    assert [u.tokens for u in uses] == [tokens, tokens, 840, 840]
    assert uses[0].corpus == uses[1].corpus != uses[2].corpus == uses[3].corpus  # one corpus under two names
    lines = inputs.header_lines([1024, 1024])
    assert lines[1] == f"corpus {megatron}.bin: 0.488 epochs, 410 of its 840 training tokens (b 0.244, b 0.244)"
    assert "no tokenizer on record for stage.phases[1].sources[1].path=" in lines[2]
    assert len([line for line in lines if "times over" in line]) == 1
    assert "too few to measure" in lines[-1]


@pytest.mark.parametrize(
    ("tokens", "row", "says"),
    [
        (0, 16, "no held-out text"),
        (1455, 1024, "holds out 1,455 tokens, fewer than 65,536: too few to measure"),
        (100_000, 1 << 20, "less than a row of 1,048,576"),
        (70_000, 1024, None),
    ],
)
def test_little_held_out_text_is_told(tokens: int, row: int, says: str | None) -> None:
    line = held_out_warning("data.path=x", tokens, row)
    assert line is None if says is None else says in line and line.startswith("warning: data.path=x")


def test_held_out_text_counts_only_where_it_is_validated_on(prepared: Path) -> None:
    tokens = [1024]
    quiet = RunInputs(DataConfig(path=str(prepared), valid_rows=0), [phase("a", 1000)], 257)
    assert len(quiet.header_lines(tokens)) == 1
    lines = RunInputs(DataConfig(path=str(prepared)), [phase("a", 1000)], 257).header_lines(tokens)
    assert (len(lines) == 2 and "held" in lines[1]) or "holds out" in lines[1]

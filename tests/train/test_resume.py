"""Options of a launch against those of the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import Layout
from mmtrain.train.resume import decide_start, layout_lines
from tests.checkpoint.fake import checkpoint, config, said

# quickstart: one phase of 983,040 tokens of 512 a row, a linear segment and an exponential one.
CONSUMED = {"tokens": 40960, "phase": 0, "row": 80, "phase_tokens": 40960}
CHANGE = "run.change_schedule=true"
LAYOUT = Layout(pp=1, dp=2, cp=1, tp=1, edp=1, ep=2, etp=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the run `a` after five steps."""
    return checkpoint(tmp_path / "a/checkpoints/step-00000005", made(tmp_path, "run.name=a"), 5, **CONSUMED)


def made(folder: Path, *overrides: str) -> PretrainConfig:
    return config(folder, *overrides)


def start(folder: Path, *overrides: str) -> Start:
    options = made(folder, *overrides)
    return decide_start(options, RunFolder(options))


def refusal(saved: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        start(saved.parents[2], f"run.resume={saved}", *overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["a", "other"])
def test_equal_options_and_free_ones_go_on(tmp_path: Path, saved: Path, name: str) -> None:
    free = ["run.max_steps=5", "log.wandb=off", "checkpoint.interval=7", "data.num_workers=3", "cluster.device=cpu"]
    assert start(tmp_path, f"run.name={name}", f"run.resume={saved}", *free) == Start(resume=saved)
    assert start(tmp_path, "run.name=a", "run.resume=auto", *free) == Start(resume=saved)


@pytest.mark.parametrize("option", ["optim.beta1=0.8", "model.drop_policy=position", "data.seed=5", "run.seed=6",
                                    "parallel.micro_batch_rows=2", "optim.precision=fp32"])  # fmt: skip
def test_what_was_trained_stays_under_any_name(saved: Path, option: str) -> None:
    name, _, value = option.partition("=")
    for extra in ([], [CHANGE]):
        line = refusal(saved, option, *extra)
        assert line.startswith(f"{name}={value}: {saved} was trained with ") and "run.init_from" in line


def test_a_phase_whose_shares_change_keeps_its_length_and_its_long_sources(tmp_path: Path) -> None:
    changing = ["stage.phases.0.long_share=0.1", "data.long_sources=[{path: qa}]"]
    path, options = tmp_path / "a/checkpoints/step-00000005", made(tmp_path, "run.name=a", *changing)
    saved = checkpoint(path, options, 5, **CONSUMED)
    line = refusal(saved, *changing, "stage.phases.0.tokens=2M", CHANGE)
    assert line.startswith(f"stage.phases[0].tokens=2000000: {saved} was trained with 983040;")
    assert refusal(saved, changing[0], CHANGE).startswith("data.long_sources")
    assert refusal(saved, *changing, "stage.phases.0.buckets=[{name: a, share: 1}]", CHANGE).startswith(
        "stage.phases[0].buckets"
    )
    moved = "data.long_sources=[{path: elsewhere, max_epochs: 2}]"
    assert start(tmp_path, "run.name=a", "run.resume=auto", changing[0], moved).resume == saved


def test_the_checkpoint_s_own_options_count_not_the_folder_s(tmp_path: Path, saved: Path) -> None:
    RunFolder(made(tmp_path, "run.name=r", "stage.phases.0.lr.1.end=1e-5")).claim(Start())
    assert start(tmp_path, "run.name=r", f"run.resume={saved}").resume == saved


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage.phases.0.lr.1.end=1e-4"],
         "stage.phases[0].lr[1].end=0.0001: {} was trained with 0.0002; give that value, or run.change_schedule=true "
         "to change the schedule from step 5 on"),
        (["stage.phases.0.lr.0.kind=constant"], "stage.phases[0].lr[0].kind=constant: {} was trained with linear;"),
        (["stage.phases.0.tokens=2M"], "stage.phases[0].tokens=2000000: {} was trained with 983040;"),
        (["stage.batch_scale=1/8"], "stage.batch_scale=0.125: {} was trained with 1.0;"),
        (["stage.token_scale=2"], "stage.token_scale=2.0: {} was trained with 1.0;"),
    ],
)  # fmt: skip
def test_one_value_is_named_and_the_way_on(saved: Path, overrides: list[str], told: str) -> None:
    assert refusal(saved, *overrides).startswith(told.format(saved))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage.phases.0.lr.1.end=1e-4"], "stage.phases[0].lr[1].end 0.0002 -> 0.0001"),
        (["stage.phases.0.tokens=2M"], "stage.phases[0].tokens 983040 -> 2000000"),
        (["stage.batch_scale=1/8"], "stage.batch_scale 1.0 -> 0.125"),
        (["stage.phases.0.batch=[{at: 0, tokens: 8Ki}, {at: 81920, tokens: 16Ki}]"],
         "stage.phases[0].batch[1].at (none) -> 81920, stage.phases[0].batch[1].tokens (none) -> 16384"),
    ],
)  # fmt: skip
def test_the_schedule_changes_from_here_on_when_asked_for(saved: Path, overrides: list[str], told: str) -> None:
    found = start(saved.parents[2], f"run.resume={saved}", CHANGE, *overrides)
    assert found.resume == saved and said(list(found.notes)) == f"schedule changed from step 5 on: {told}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage.phases.0.seq_len=1024"], "stage.phases[0].seq_len=1024: {} was trained with 512;"),
        (["stage.phases.0.rope_base=1e6"], "stage.phases[0].rope_base=1000000.0: {} was trained with 10000.0;"),
        (["stage.phases.0.sources=[{path: x, weight: 3}, {path: y}]"],
         "stage.phases[0].sources[0].weight=3.0: {} was trained with (none);"),
        (["stage.scale=1/2"], "stage.scale=0.5: {} was trained with 1.0;"),
        (["stage.phases.0.tokens=32Ki"], "stage.phases[0].tokens=32768: {} was trained with 983040;"),
    ],
)  # fmt: skip
def test_what_the_phase_at_work_is_stays(saved: Path, overrides: list[str], told: str) -> None:
    line = refusal(saved, CHANGE, *overrides)
    assert line.startswith(told.format(saved)) and "trained already" in line
    assert "change_schedule=true" not in refusal(saved, *overrides)


def test_lengths_and_bases_of_all_trained_phases_are_told_at_once(tmp_path: Path) -> None:
    """Of a run in the second of its phases; what the third becomes is free."""
    phase = "{name: %s, seq_len: %d, rope_base: 1e4, tokens: 8192, batch: [{at: 0, tokens: 1024}], " \
            "lr: [{kind: constant, tokens: 8192, end: 0.01}]}"  # fmt: skip
    three = f"stage.phases=[{','.join(phase % one for one in (('a', 64), ('b', 128), ('c', 256)))}]"
    at = {"tokens": 9216, "phase": 1, "row": 8, "phase_tokens": 1024}
    saved = checkpoint(tmp_path / "a/checkpoints/step-00000009", made(tmp_path, "run.name=a", three), 9, **at)
    other = [f"stage.phases.{i}.rope_base={i + 2}e6" for i in range(3)]
    line = refusal(saved, three, CHANGE, *other, "stage.phases.1.seq_len=64")
    assert line.startswith(
        f"stage.phases[0].rope_base=2000000.0: {saved} was trained with 10000.0; and stage.phases[1].seq_len=64: with "
        "128; and stage.phases[1].rope_base=3000000.0: with 10000.0; give that value"
    )
    # A scale changes every phase, and is named once.
    line = refusal(saved, three, CHANGE, "stage.scale=2")
    assert line.startswith(f"stage.scale=2.0: {saved} was trained with 1.0; give that value")


def test_the_weights_of_a_mixture_stay(tmp_path: Path) -> None:
    mixture = "stage.phases.0.sources=[{path: x, weight: %s}, {path: y}]"
    path = tmp_path / "a/checkpoints/step-00000005"
    saved = checkpoint(path, made(tmp_path, "run.name=a", mixture % 3), 5, **CONSUMED)
    line = refusal(saved, CHANGE, mixture % 2)
    assert line.startswith(f"stage.phases[0].sources[0].weight=2.0: {saved} was trained with 3.0;")


def phases(config: PretrainConfig) -> dict:
    """The options with two phases of 983,040 tokens."""
    recorded = asdict(config)
    recorded["stage"]["phases"] *= 2
    return recorded


# The second phase; a record of an older version, which says how many tokens the run consumed, is in it too.
@pytest.mark.parametrize("progress", [{"phase": 1, "phase_tokens": 8192, "row": 16}, {}])
def test_an_earlier_phase_stays_and_later_ones_change(tmp_path: Path, progress: dict[str, int]) -> None:
    path = tmp_path / "a/checkpoints/step-00000121"
    saved = checkpoint(path, phases(made(tmp_path)), 121, **({"tokens": 983040 + 8192} | progress))
    head = "{name: q, seq_len: 512, rope_base: 1e4, batch: [{at: 0, tokens: 8Ki}], "
    same = head + "tokens: 960Ki, lr: [{kind: linear, tokens: 160Ki, start: 0, end: 2e-3}, " \
                  "{kind: exponential, tokens: 800Ki, start: 2e-3, end: 2e-4}]}"  # fmt: skip
    block = head + "tokens: 2M, lr: [{kind: constant, tokens: 1M, end: 1}]}"
    assert start(tmp_path, f"run.resume={saved}", f"stage.phases=[{same},{same}]") == Start(resume=saved)
    changed = start(tmp_path, f"run.resume={saved}", CHANGE, f"stage.phases=[{same},{block},{block}]")
    assert "stage.phases[1].tokens 983040 -> 2000000" in said(list(changed.notes))
    line = refusal(saved, CHANGE, f"stage.phases=[{block},{same}]")
    assert line.startswith("stage.phases[0].tokens=2000000: ")
    assert "stage.phases[1]" in refusal(saved, CHANGE, f"stage.phases=[{same}]")


def test_an_option_of_a_later_version_counts_as_its_default(tmp_path: Path) -> None:
    old = asdict(made(tmp_path))
    del (
        old["run"]["seed"],
        old["optim"]["decay_norms"],
        old["stage"]["phases"][0]["lr"][0]["start"],
        old["stage"]["scale"],
    )
    saved = checkpoint(tmp_path / "a/checkpoints/step-00000005", old, 5, **CONSUMED)
    assert start(tmp_path, f"run.resume={saved}") == Start(resume=saved)
    assert "run.seed=6: " in refusal(saved, "run.seed=6")
    assert "optim.decay_norms=True: " in refusal(saved, "optim.decay_norms=true")


def test_an_option_that_is_no_more_is_named(tmp_path: Path) -> None:
    newer = asdict(made(tmp_path))
    newer["optim"]["momentum"] = 0.9
    saved = checkpoint(tmp_path / "a/checkpoints/step-00000005", newer, 5, **CONSUMED)
    assert refusal(saved).startswith(f"optim.momentum=(none): {saved} was trained with 0.9;")


def test_a_layout_that_is_not_the_checkpoint_s_is_told(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step-00000003", {"model": {}}, layout=asdict(LAYOUT))
    begun, other = Start(resume=path), replace(LAYOUT, dp=1, tp=2)
    assert layout_lines(begun, LAYOUT, True) == [] and layout_lines(Start(), other, True) == []
    line = f"layout  dp 2 -> 1, tp 1 -> 2 since {path}: the run goes on the same but for rounding"
    assert layout_lines(begun, other, False) == [line]
    first, second = layout_lines(begun, other, True)
    assert first == line and second.startswith("warning: parallel.global_router=true: ")
    assert layout_lines(Start(resume=checkpoint(tmp_path / "step-00000004", {"model": {}}, 4)), other, True) == []

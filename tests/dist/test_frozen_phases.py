"""A run whose phases freeze other parts: what checkpoints hold, how moments begin anew, and resumes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.tensors import StoredTensors
from mmtrain.model.frozen import is_frozen
from tests.dist.runs import SMALL, pretrain, records, steps
from tests.dist.test_phase_layouts import TIMES

LR, DECAY, B1, B2, EPS = 0.01, 0.1, 0.9, 0.95, 1e-8
BOTTOM = ("embed_tokens", "layers.0")  # all that the first stage of the second phase's pipeline has
PHASE = "{name: %s, seq_len: 64, rope_base: 1e4, tokens: 2048, batch: [{at: 0, tokens: 512}], " \
        "lr: [{kind: constant, tokens: 2048, end: 0.01}], parallel: %s, frozen: %s}"  # fmt: skip
PHASES = (
    ("a", "{tp: 2}", "null"),
    ("b", "{pp: 2}", "[embed_tokens,layers.0]"),
    ("c", "{reshard_after_forward: false}", "[lm_head]"),
)
OPTIONS = [
    *(one for one in SMALL if not one.startswith("stage.")),
    f"stage.phases=[{','.join(PHASE % phase for phase in PHASES)}]",
    "checkpoint.keep=0",
    "checkpoint.interval=1",
    "run.name=run",
]


class Whole(NamedTuple):
    """A run through all phases, and what it printed."""

    run: Path
    printed: str

    def at(self, step: int) -> StoredTensors:
        """The tensors after a step."""
        return StoredTensors(self.run / f"checkpoints/step-{step:08d}")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("frozen")
    done = pretrain(*OPTIONS, f"data.path={corpus}", f"run.dir={folder}", processes=2)
    yield Whole(folder / "run", done.stdout + done.stderr)


def weights(tensors: StoredTensors) -> dict[str, torch.Tensor]:
    return {name[6:]: tensors.whole(name) for name in tensors.shapes if name.startswith("model.")}


def moment_names(tensors: StoredTensors) -> set[str]:
    prefix, suffix = "optimizer.state.", ".exp_avg"
    found = (name for name in tensors.shapes if name.startswith(prefix) and name.endswith(suffix))
    return {name.removeprefix(prefix).removesuffix(suffix) for name in found}


def count(whole: Whole, step: int, name: str) -> int:
    """Updates that a parameter's moments have seen."""
    return int(whole.at(step).whole(f"optimizer.state.{name}.step"))


def test_what_a_phase_freezes_stays_to_the_bit(whole: Whole) -> None:
    for first, last, patterns in ((4, 8, BOTTOM), (8, 12, ("lm_head",))):
        before, after = weights(whole.at(first)), weights(whole.at(last))
        assert any(is_frozen(name, patterns) for name in before)
        for name in before:
            assert torch.equal(before[name], after[name]) is is_frozen(name, patterns), name


def test_checkpoints_have_moments_of_what_is_trained_alone(whole: Whole) -> None:
    names = set(weights(whole.at(4)))
    for step, patterns in ((4, ()), (5, BOTTOM), (8, BOTTOM), (9, ("lm_head",))):
        trained = {name for name in names if not is_frozen(name, patterns)}
        assert moment_names(whole.at(step)) == trained, step
        checkpoint = whole.run / f"checkpoints/step-{step:08d}"
        assert read_meta(checkpoint)["frozen"] == list(patterns)
        parts = sum(math.prod(whole.at(step).shapes[f"model.{name}"]) for name in trained)
        stored = whole.at(step)
        moments = [name for name in stored.shapes if name.endswith((".exp_avg", ".exp_avg_sq"))]
        assert sum(stored.bytes_of(name) for name in moments) == 2 * 4 * parts


def by_hand(weight: torch.Tensor, stored: StoredTensors, name: str, updates: int) -> torch.Tensor:
    """AdamW's update of a weight, given the moments after it and how many updates they have seen."""
    m, v = (stored.whole(f"optimizer.state.{name}.{kind}").double() for kind in ("exp_avg", "exp_avg_sq"))
    decay = DECAY if weight.ndim > 1 else 0.0
    ratio = (m / (1 - B1**updates)) / ((v / (1 - B2**updates)).sqrt() + EPS)
    return weight.double() * (1 - LR * decay) - LR * ratio


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.mixer.norm.weight"])
def test_what_is_trained_again_begins_with_new_moments(whole: Whole, name: str) -> None:
    stored = whole.at(9)
    m, v = (stored.whole(f"optimizer.state.{name}.{kind}").double() for kind in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close((m / (1 - B1)).square(), v / (1 - B2), rtol=1e-4, atol=1e-12)  # of one gradient
    assert [count(whole, step, name) for step in (4, 9, 12)] == [4, 1, 4]
    expected = by_hand(weights(whole.at(8))[name], stored, name, updates=1)
    torch.testing.assert_close(weights(stored)[name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mixer.qkv_proj.weight"])
def test_what_is_trained_all_along_keeps_its_moments(whole: Whole, name: str) -> None:
    names = weights(whole.at(4))
    name = name if name in names else next(one for one in names if one.startswith("layers.1.mixer"))
    for step in (5, 9):
        assert count(whole, step, name) == step
        expected = by_hand(weights(whole.at(step - 1))[name], whole.at(step), name, updates=step)
        torch.testing.assert_close(weights(whole.at(step))[name].double(), expected, rtol=0, atol=1e-6)


def test_a_phase_that_freezes_other_parts_is_told(whole: Whole) -> None:
    events = [record["layout_changed"] for record in records(whole.run) if "layout" in record]
    assert [event.rpartition("frozen ")[2] for event in events] == [
        "[] -> [embed_tokens, layers.0]", "[embed_tokens, layers.0] -> [lm_head]",
    ]  # fmt: skip
    assert "frozen  b: embed_tokens, layers.0: " in whole.printed and "frozen  a:" not in whole.printed


@pytest.mark.parametrize("after", [pytest.param(4, marks=pytest.mark.slow), 6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_to_the_bit(whole: Whole, corpus: Path, tmp_path: Path, after: int) -> None:
    """From a boundary's checkpoint and from within a phase that freezes."""
    shutil.copytree(whole.run, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        if int(checkpoint.name[5:]) > after:
            shutil.rmtree(checkpoint)
    pretrain(*OPTIONS, f"data.path={corpus}", f"run.dir={tmp_path}", "run.resume=auto", processes=2)
    resumed = Whole(tmp_path / "run", "")
    same = [{k: v for k, v in record.items() if k not in TIMES} for record in steps(whole.run)]
    assert [{k: v for k, v in record.items() if k not in TIMES} for record in steps(resumed.run)] == same
    mine, theirs = weights(resumed.at(12)), weights(whole.at(12))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_another_run_takes_weights_and_moments_over(whole: Whole, corpus: Path, tmp_path: Path) -> None:
    """One that trains all, from a checkpoint of the phase that froze the bottom, and the other way."""
    stage = PHASE % ("d", "{cp: 1}", "null")
    options = [one for one in OPTIONS if not one.startswith("stage.phases=")]
    for name, frozen, step in (("thawed", "[]", 8), ("frozen", "[embed_tokens,layers.0]", 4)):
        given = f"run.init_from={whole.run}/checkpoints/step-{step:08d}", f"optim.frozen={frozen}", "run.max_steps=1"
        pretrain(*options, f"stage.phases=[{stage}]", *given, f"data.path={corpus}", f"run.dir={tmp_path / name}")
        stored = StoredTensors(tmp_path / name / "run/checkpoints/step-00000001")
        counts = {one: int(stored.whole(f"optimizer.state.{one}.step")) for one in moment_names(stored)}
        for one in weights(stored):
            bottom = is_frozen(one, BOTTOM)
            assert counts.get(one) == ((1 if name == "thawed" else None) if bottom else step + 1), one

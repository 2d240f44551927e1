"""What each phase of a run freezes: its own patterns or the run's, checked before anything starts, told, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.train.phase_frozen import check_phases_frozen, frozen_change, frozen_parts
from mmtrain.train.plan_run import plan_run
from tests.checkpoint.fake import checkpoint, config
from tests.train.test_resume import CHANGE, CONSUMED, refusal, start

PHASE = "{name: %s, seq_len: 512, rope_base: 1e4, tokens: 491520, batch: [{at: 0, tokens: 4096}], " \
        "lr: [{kind: constant, tokens: 491520, end: 1e-3}], frozen: %s}"  # fmt: skip


def made(folder: Path, *frozen: str, run: str = "[]") -> PretrainConfig:
    phases = ",".join(PHASE % (f"p{i}", one) for i, one in enumerate(frozen))
    return config(folder, "run.name=a", f"stage.phases=[{phases}]", f"optim.frozen={run}")


def test_a_phase_s_own_patterns_come_before_the_run_s(tmp_path: Path) -> None:
    options = made(tmp_path, "null", "[]", "[norm]", run="[embed_tokens]")
    assert [frozen_parts(options.optim, one) for one in options.stage.phases] == [("embed_tokens",), (), ("norm",)]
    planned = plan_run(options, 1, torch.device("cpu"))
    assert [laid.frozen for laid in planned.layouts] == [("embed_tokens",), (), ("norm",)]
    assert [line.split(":")[0] for line in planned.choices if "frozen" in line] == ["frozen  p0", "frozen  p2"]


@pytest.mark.parametrize(
    ("phases", "run", "told"),
    [
        (("[norm, layers.*.mixr]", "null"), "[]", "stage.phases[0].frozen[1]=layers.*.mixr: fits no parameter of"),
        (("[norm]", "[norm]"), "[head]", "optim.frozen[0]=head: fits no parameter of the model"),
        (("null", '["*"]'), "[]", "stage.phases[1].frozen=['*']: leaves nothing to train"),
    ],
)
def test_patterns_are_checked_before_anything_starts(tmp_path: Path, phases: tuple, run: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_run(made(tmp_path, *phases, run=run), 1, torch.device("cpu"))
    assert str(caught.value).startswith(told)
    check_phases_frozen(made(tmp_path, "null"))


def test_less_is_predicted_for_less_that_is_trained(tmp_path: Path) -> None:
    options = made(tmp_path, "[]", '["*", "!norm"]')
    some, few = (phase.memory for phase in plan_run(options, 1, torch.device("cpu")).plan.phases)
    assert few.parts["optimizer"] < 0.01 * some.parts["optimizer"]


def test_the_words_of_a_change() -> None:
    assert frozen_change(("norm",), ("norm",)) == ""
    assert frozen_change(("norm", "layers.0"), ()) == "frozen [norm, layers.0] -> []"


def test_a_resume_keeps_what_was_frozen(tmp_path: Path) -> None:
    """However it is written; what is ahead may change with the schedule."""
    path, before = tmp_path / "a/checkpoints/step-00000005", made(tmp_path, "null", "[]", run="[norm]")
    saved = checkpoint(path, before, 5, **CONSUMED)

    def options(*frozen: str, run: str = "[]") -> list[str]:
        phases = ",".join(PHASE % (f"p{i}", one) for i, one in enumerate(frozen))
        return [f"stage.phases=[{phases}]", f"optim.frozen={run}"]

    assert start(tmp_path, "run.name=a", "run.resume=auto", *options("[norm]", "[]")).resume == saved
    line = refusal(saved, *options("[embed_tokens]", "[]"), CHANGE)
    assert "was trained with norm" in line and line.startswith("stage.phases[0].frozen[0]=embed_tokens")
    line = refusal(saved, *options("null", "[]", run="[embed_tokens]"), CHANGE)
    assert "was trained with norm" in line
    assert "run.change_schedule=true" in refusal(saved, *options("[norm]", "[lm_head]"))
    assert start(tmp_path, "run.name=a", "run.resume=auto", *options("[norm]", "[lm_head]"), CHANGE).resume == saved


def test_checkpoints_of_before_the_option_go_on(tmp_path: Path) -> None:
    path, options = tmp_path / "a/checkpoints/step-00000005", made(tmp_path, "null")
    old = replace(options)
    saved = checkpoint(path, old, 5, **CONSUMED)
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"frozen": []', '"max_skipped": 10').replace(', "frozen": null', ""))
    assert start(tmp_path, "run.name=a", "run.resume=auto", f"stage.phases=[{PHASE % ('p0', 'null')}]").resume == saved

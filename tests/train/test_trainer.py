"""The training loop around a step that is made up: what it passes on, what it saves, and when it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError, RunStopped
from mmtrain.health.stragglers import Stragglers
from mmtrain.train import between_steps, session
from mmtrain.train import trainer as module
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.early_stop import EarlyStop
from mmtrain.train.evaluate import Validation
from mmtrain.train.session import Session
from mmtrain.train.spike_guard import SpikeGuard
from mmtrain.train.trainer import Trainer
from mmtrain.train.warmup import AttentionPlans
from tests.checkpoint.fake import config
from tests.train.test_batches import Stream
from tests.train.test_report import RESULT

GOOD, BAD, STOPS = RESULT, replace(RESULT, skipped=True), replace(RESULT, stop=True)
PHASE = "{name: %s, seq_len: %d, rope_base: %g, tokens: 128, batch: [{at: 0, tokens: 32}], " \
        "lr: [{kind: linear, tokens: 128, start: %g, end: %g}]}"  # fmt: skip
PHASES = f"stage.phases=[{PHASE % ('a', 16, 1e4, 0.0, 1.0)},{PHASE % ('b', 32, 1e6, 1.0, 0.0)}]"  # 4 steps each


class Loop(Trainer):
    """A trainer whose model, rows and report are made up; `done` lists what it did."""

    def __init__(self, options: PretrainConfig) -> None:
        self.config, self.plan = options, RunPlan(scaled_phases(options.stage), 1, 1)
        self.folder, self.progress, self.skipped_in_row = RunFolder(options), Progress(), 0
        self.guard, self.stragglers = SpikeGuard(options.guard), Stragglers(0, torch.device("cpu"), torch.float32)
        self.finite, self.held_out, self.needles, self.validated = True, 1.0, None, None
        self.early_stop, self.references, self.reference, self.lines = EarlyStop(None), None, None, []
        self.plans = AttentionPlans()
        self.marks: list[dict[str, Any]] = []
        model, batches = (
            SimpleNamespace(weights_are_finite=lambda: self.finite, odd_copies=lambda: [], take_notes=lambda: []),
            SimpleNamespace(read=lambda step: []),
        )
        first = SimpleNamespace(get_local_rank=lambda: 0)
        context = SimpleNamespace(dense=dict.fromkeys(("pp", "cp", "tp"), first))
        self.session = SimpleNamespace(model=model, optimizer=None, batches=batches, laid=None, context=context)
        self.done: list[tuple[Any, ...]] = []
        self.settled: list[int] = []

    def save(self, session: object, progress: Progress, rope_base: float, marks: dict[str, Any], last: bool) -> None:
        self.done.append(("save", progress.step, rope_base, last))
        self.marks.append(marks)

    def settle(self) -> None:
        self.settled.append(self.progress.step)

    def remove_old(self) -> None:
        self.done.append(("remove", self.progress.step))

    def _validate(self, phase: object, report: object) -> Validation:
        self.done.append(("validate", self.progress.step))
        self.validated = self.progress.step, self.held_out
        return Validation(self.held_out, 1.0)

    def steps(
        self, results: list[Any], monkeypatch: pytest.MonkeyPatch, received: signal.Signals | None = None
    ) -> list[Any]:
        """Run as many steps with these results; what each was given."""
        given, left = [], iter(results)

        def step(model: object, optimizer: object, batches: object, lr: float, base: float, **more: Any) -> Any:
            given.append((lr, base, more["clip_grad"], more["stop"]()))
            return next(left)

        monkeypatch.setattr(module, "train_step", step)
        for _ in results:
            report = SimpleNamespace(step=lambda *told: None, pace=lambda *told: None)
            self._step(self._next(), report, self, SimpleNamespace(received=received))
        return given


def loop(folder: Path, *overrides: str) -> Loop:
    return Loop(config(folder, PHASES, "checkpoint.interval=0", "log.valid_interval=0", *overrides))


def test_a_step_gets_its_phase_s_rate_and_base_and_the_limit_of_its_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = loop(tmp_path, "optim.clip_grad=0.7"), replace(GOOD, tokens=32)
    given = run.steps([full] * 6, monkeypatch)
    assert given == [*((i / 4, 1e4, 0.7, False) for i in (1, 2, 3, 4)), (0.75, 1e6, 0.7, False), (0.5, 1e6, 0.7, False)]
    assert run.progress == Progress(6, 6 * 32, 1, 2, 64) and run._next().first_row == 2


def test_tokens_of_text_count_not_those_of_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(tmp_path)
    run.steps([replace(GOOD, tokens=24)] * 2, monkeypatch)
    assert run.progress == Progress(2, 48, 0, 4, 48)


def test_a_skipped_step_has_used_its_rows_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(tmp_path)
    run.steps([replace(BAD, tokens=32)], monkeypatch)
    assert run.progress == Progress(1, 32, 0, 2, 32)


def test_checkpoints_are_confirmed_by_the_next_good_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(tmp_path, "checkpoint.interval=2")
    run.steps([replace(one, tokens=32) for one in (GOOD, GOOD, BAD, BAD, GOOD)], monkeypatch)
    assert run.done == [("remove", 1), ("remove", 2), ("save", 2, 1e4, False), ("remove", 5)]  # none saved at step 4


def test_the_last_weights_are_validated_saved_and_only_then_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop(tmp_path, "run.max_steps=3", "log.valid_interval=2")
    run.steps([replace(GOOD, tokens=32)] * 3, monkeypatch)
    assert run.done == [("remove", 1), ("remove", 2), ("validate", 2), ("validate", 3), ("save", 3, 1e4, True),
                        ("remove", 3)] and run._next() is None  # fmt: skip
    unsaved = loop(tmp_path, "run.max_steps=1", "checkpoint.save_final=false", "data.valid_rows=0")
    unsaved.steps([GOOD], monkeypatch)
    assert unsaved.done == [("validate", 1)]


def test_needles_follow_each_step_with_what_is_left_of_its_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(model: object, phase: Any, progress: Progress, left: int, seconds: float, report: object) -> None:
        run.done.append((phase.name, progress.step, left))

    run = loop(tmp_path, "run.max_steps=7")
    run.needles = SimpleNamespace(after_step=look)
    run.steps([replace(GOOD, tokens=32)] * 7, monkeypatch)
    told = [what for what in run.done if what[0] in ("a", "b")]
    assert told == [("a", 1, 3), ("a", 2, 2), ("a", 3, 1), ("a", 4, 0), ("b", 5, 2), ("b", 6, 1), ("b", 7, 0)]
    needles, saved = run.done.index(("b", 7, 0)), run.done.index(("save", 7, 1e6, True))
    assert needles < saved  # a run that dies in them does them again
    run = loop(tmp_path)
    run.needles = SimpleNamespace(after_step=look)
    with pytest.raises(RunStopped):
        run.steps([replace(STOPS, tokens=32)], monkeypatch)
    assert "save" in [what[0] for what in run.done]
    assert "a" not in [what[0] for what in run.done]  # who asks for a stop does not wait


@pytest.mark.parametrize("overrides", [["checkpoint.interval=1"], ["run.max_steps=1"]])
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    run = loop(tmp_path, *overrides)
    run.finite = False
    with pytest.raises(RunStopped, match="the weights hold numbers that are not finite") as stopped:
        run.steps([GOOD], monkeypatch)
    assert stopped.value.exit_code == RunStopped.NOT_FINITE and "save" not in [what[0] for what in run.done]


def test_a_held_out_loss_that_is_not_finite_ends_the_run_at_its_last_step_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop(tmp_path, "run.max_steps=2", "log.valid_interval=1")
    run.held_out = float("nan")
    with pytest.raises(RunStopped, match="after step 2: the held-out loss of the last weights is not finite"):
        run.steps([replace(GOOD, tokens=32)] * 2, monkeypatch)
    assert "save" not in [what[0] for what in run.done]


def test_skipped_steps_count_in_a_row_and_a_last_one_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, bad, good = loop(tmp_path, "optim.max_skipped=2"), replace(BAD, tokens=8), replace(GOOD, tokens=8)
    run.steps([bad, good, bad, good], monkeypatch)
    with pytest.raises(RunStopped, match=r"after step 6: loss or gradient of the last 2 steps"):
        run.steps([bad, bad], monkeypatch)
    with pytest.raises(RunStopped, match=r"after step 1: loss or gradient of the last 1 steps"):
        loop(tmp_path, "run.max_steps=1").steps([bad], monkeypatch)


@pytest.mark.parametrize(("received", "code"), [(None, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_stop_that_any_rank_asks_for_is_saved_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, received: signal.Signals | None, code: int
) -> None:
    run = loop(tmp_path)
    assert run.steps([GOOD], monkeypatch, received)[0][3] is (received is not None)  # what a step tells the other ranks
    run = loop(tmp_path)
    with pytest.raises(RunStopped, match="after step 1") as stopped:
        run.steps([STOPS], monkeypatch, received)
    assert stopped.value.exit_code == code and ("save", 1, 1e4, True) in run.done
    skipped = loop(tmp_path)
    with pytest.raises(RunStopped, match="after step 1"):  # its weights are those of the step before: none to save
        skipped.steps([replace(BAD, stop=True)], monkeypatch, received)
    assert skipped.done == []


def test_ranks_validate_the_rows_in_turn_and_surplus_ones_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def look(model: object, batches: Iterator[tuple[Any, bool]], token_bytes: object, rope_base: float) -> Validation:
        seen.extend((batch.rows[0], counts) for batch, counts in batches)
        assert rope_base == 1e6
        return Validation(1.0, 1.0)

    monkeypatch.setattr(between_steps, "evaluate", look)
    stream = Stream(0)
    stream.rows_per_epoch = lambda: 100
    for rank in range(2):
        run = loop(tmp_path, "data.valid_rows=3")
        run.inputs = SimpleNamespace(valid_stream=lambda seq_len: stream, token_bytes=None)
        run.session.context = SimpleNamespace(dp_rank=rank, dp_size=2)
        Trainer._validate(run, run.plan.phases[1].phase, SimpleNamespace(validation=lambda *told: None))
    assert seen == [(0, True), (2, True), (1, True), (2, False)]


def test_an_error_within_a_boundary_between_layouts_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the old layout is gone by then, and whatever of the new one is not there yet."""
    run, closed = loop(tmp_path), []
    run.memory = run.inputs = None
    for name, phase in zip("ab", run.plan.phases, strict=True):
        phase.laid = name
    run.session = SimpleNamespace(
        laid="a", context=None, close=lambda: 0.0, batches=SimpleNamespace(close=lambda: closed.append(True)),
        model=SimpleNamespace(weights_are_finite=lambda: True, odd_copies=lambda: []),
    )  # fmt: skip
    run.progress = Progress(4, 128, 0, 8, 128)
    saver = SimpleNamespace(newest=None, settle=lambda: None, release=lambda: None)
    saver.save = lambda session, progress, base, marks, last: setattr(saver, "newest", (progress.step, tmp_path))

    def fail(*given: object) -> None:
        raise ConfigError("stage.phases[1].parallel", "b", "does not fit", "give another")

    monkeypatch.setattr(module, "Session", fail)
    with pytest.raises(ConfigError, match="does not fit"):
        run._train(SimpleNamespace(step=0), SimpleNamespace(), saver, SimpleNamespace(received=None))
    assert saver.newest == (4, tmp_path) and closed == [True]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_old_layout_is_given_back_before_the_new_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuned: bool, fails: bool
) -> None:
    """Both at once would not fit; the new one starts from the checkpoint of the very step before, with its moments."""
    run, done = loop(tmp_path), []
    run.inputs, run.progress = None, Progress(4, 128, 0, 8, 128)
    model = SimpleNamespace(weights_are_finite=lambda: True, odd_copies=lambda: [])
    run.session = SimpleNamespace(laid="a", context="groups", close=lambda: done.append("close") or 1.5, model=model)

    def load(path: Path, with_optimizer: bool) -> None:
        done.append(("load", path.name, with_optimizer))
        if fails:
            raise ConfigError("checkpoint", path, "is damaged", "take another")

    def make(
        config: object, context: object, plan: object, phase_index: int, inputs: object, log: object
    ) -> SimpleNamespace:
        done.append(("make", context, phase_index))
        return SimpleNamespace(
            laid="b", load=load, model=SimpleNamespace(is_tuned=tuned),
            prepare=lambda plans: ["chosen"] if plans is run.plans else [],
        )  # fmt: skip

    monkeypatch.setattr(module, "Session", make)
    saver = SimpleNamespace(newest=(3, tmp_path / "step-3"), settle=lambda: done.append("settle"))
    saver.release = lambda: done.append("release")
    saver.begin_reserve = lambda session: done.append(("begin", session.laid))
    saver.reserve = lambda session: done.append(("reserve", session.laid))
    saver.save = lambda session, progress, base, marks, last: (
        done.append(("save", progress.step, last)),
        setattr(saver, "newest", (progress.step, tmp_path / "step-4")),
    )
    report = SimpleNamespace(note=done.append, new_layout=lambda step, before, after, seconds, held: done.append(held))
    begun = ["settle", ("save", 4, True), "release", "close", ("make", "groups", 1), ("begin", "b"),
             ("load", "step-4", True)]  # fmt: skip
    if fails:
        with pytest.raises(ConfigError, match="is damaged"):
            run._cross(SimpleNamespace(phase_index=1), report, saver)
        assert done == [*begun, "release"]
        return
    run._cross(SimpleNamespace(phase_index=1), report, saver)
    measured = [("reserve", "b")] if tuned else []  # nothing is measured beside the pinning
    assert done == [*begun, *measured, "chosen", ("reserve", "b"), 1.5]


def test_a_checkpoint_of_weights_that_are_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(session, "load_checkpoint", lambda path, model, optimizer, parts: read.append(optimizer))
    one, finite = Session.__new__(Session), [True, True, False]
    one.model = SimpleNamespace(module=None, weights_are_finite=lambda: finite.pop(0))
    one.optimizer = "moments"
    one.load(tmp_path, with_optimizer=False)
    one.load(tmp_path, with_optimizer=True)
    with pytest.raises(ConfigError, match="holds weights that are infinite or not numbers"):
        one.load(tmp_path, with_optimizer=True)
    assert read == [None, "moments", "moments"]


def test_a_checkpoint_says_by_what_it_may_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop(tmp_path, "checkpoint.interval=3", "log.valid_interval=6", "checkpoint.keep_phase_ends=true")
    made.steps([replace(RESULT, tokens=32)] * 8, monkeypatch)
    saved = [step for kind, step, *_ in made.done if kind == "save"]
    assert saved == [3, 4, 6, 8]  # 4 and 8 are the ends of the phases
    assert [marks["phase_end"] for marks in made.marks] == [False, True, False, True]
    assert [marks.get("valid_loss") for marks in made.marks] == [None, None, 1.0, 1.0]


def test_a_checkpoint_gets_its_name_when_no_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop(tmp_path, "checkpoint.interval=2")
    idle, writes = (replace(RESULT, tokens=32, writing=writing) for writing in (False, True))
    made.steps([idle, writes, writes, idle], monkeypatch)
    assert made.settled == [0, 3]  # before the step counts: in the first and the fourth

"""Preference training through the trainer, on pairs of text alone: the reference, resume, early stop, refusals."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.train import reference_pass, reference_store
from mmtrain.train.prepared_run import plan_launch, prepare_run
from tests.data.images.made import prepared, write_records
from tests.dist.pool import Pool
from tests.dist.runs import ROOT, SMALL, records, steps
from tests.dist.test_whole_run import train

WORDS = ("cat", "dog", "sun", "map", "cup", "toy", "red", "sky")
PART_ROWS = 3
FIGURES = ("step", "loss", "grad_norm", "pairs", "pair_accuracy", "pair_margin", "reward_chosen", "reward_rejected")


def text_pairs(folder: Path) -> Path:
    draw, made = random.Random(0), []
    for i in range(90):
        chosen, rejected = draw.sample(WORDS, 2)
        made.append({"prompt": f"say {chosen} {i}", "chosen": chosen * draw.randint(1, 3), "rejected": rejected})
    prepared(write_records(folder, made), folder / "corpus", valid_fraction=0.2)
    return folder / "corpus"


def configuration(corpus: Path, folder: Path, *overrides: str) -> PretrainConfig:
    options = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "model.vocab_size=300", "data.max_epochs=null",
               "stage.phases.0.batch.0.tokens=256", "model.num_experts=0", *overrides]  # fmt: skip
    return compose(options, ROOT / "configs")


def preference(
    made: tuple[Path, Path], *overrides: str, beta: float = 0.5, patience: int | str = "null"
) -> PretrainConfig:
    corpus, folder = made
    stage = f"stage.preference={{beta: {beta}, patience: {patience}}}"
    return configuration(corpus, folder, stage, f"run.init_from={folder}/start",
                         "run.init_optimizer=false", "checkpoint.interval=2", "checkpoint.keep=0",
                         "checkpoint.asynchronous=false", *overrides)  # fmt: skip


def pretrained(*configs: PretrainConfig, parts: int | None = None) -> None:
    """Run them in small parts; `parts`: the disk is full after so many."""
    rows, write, written = reference_pass.PART_ROWS, reference_store.ReferenceStore.write, []

    def failing(store: reference_store.ReferenceStore, part: int, log_probs: dict) -> None:
        if len(written) == parts:
            raise OSError(28, "No space left on device")
        written.append(part)
        write(store, part, log_probs)

    reference_pass.PART_ROWS, reference_store.ReferenceStore.write = PART_ROWS, failing
    try:
        train(*configs)
    finally:
        reference_pass.PART_ROWS, reference_store.ReferenceStore.write = rows, write


def cut_short(config: PretrainConfig) -> None:
    with pytest.raises(OSError, match="No space left"):
        pretrained(config, parts=2)


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a folder with two runs on next tokens to start from and one of preferences, of four steps."""
    folder = tmp_path_factory.mktemp("preferences")
    corpus = text_pairs(folder / "data")
    starts = [configuration(corpus, folder, f"run.name={name}", "run.max_steps=2", f"run.seed={seed}")
              for name, seed in (("start", 1), ("other", 2))]  # fmt: skip
    whole = preference((corpus, folder), "run.name=whole", "run.max_steps=4", "log.valid_interval=2")
    pool.run(pretrained, *starts, whole, world=1)
    return corpus, folder


def stored(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "reference").iterdir())}


def figures(run: Path) -> list[list]:
    return [[record[name] for name in FIGURES] for record in steps(run)]


def test_the_first_step_begins_at_the_reference_and_later_ones_leave_it(made: tuple[Path, Path]) -> None:
    first, *_, last = steps(made[1] / "whole")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(first["pair_margin"]) < 1e-4
    assert abs(last["pair_margin"]) > 0.01 and last["loss"] != pytest.approx(first["loss"], abs=1e-3)
    valid = [record for record in records(made[1] / "whole") if "val_loss" in record]
    assert [record["step"] for record in valid] == [2, 4] and valid[0]["val_pairs"] > 5


def test_a_pass_that_was_cut_short_goes_on_and_gives_the_same(pool: Pool, made: tuple[Path, Path]) -> None:
    config = preference(made, "run.name=cut", "run.max_steps=4", "run.resume=auto", "log.valid_interval=2")
    pool.run(cut_short, config, world=1)
    run = made[1] / "cut"
    assert sorted(stored(run)) == ["part-000000.json", "part-000001.json", "reference.json"]
    before = (run / "reference/part-000001.json").stat().st_mtime_ns
    (run / "reference/part-000000.json").write_text('{"pairs": {}, "sum": "damaged"}')
    pool.run(pretrained, config, world=1)
    assert stored(run) == stored(made[1] / "whole") and len(stored(run)) > 3
    assert (run / "reference/part-000001.json").stat().st_mtime_ns == before
    assert figures(run) == figures(made[1] / "whole")


def test_a_resumed_run_is_the_same_run_with_its_reference_or_without(pool: Pool, made: tuple[Path, Path]) -> None:
    """Whether the log-probabilities are still there or computed again, from the weights that it started from."""
    for name, deletes in (("kept", False), ("anew", True)):
        shutil.rmtree(shutil.copytree(made[1] / "whole", made[1] / name) / "checkpoints/step-00000004")
        if deletes:
            shutil.rmtree(made[1] / name / "reference")
        rest = preference(made, f"run.name={name}", "run.max_steps=4", "run.resume=auto", "log.valid_interval=2")
        pool.run(pretrained, rest, world=1)
        assert " after step 2\n" in (made[1] / name / "log.txt").read_text()
        assert figures(made[1] / name) == figures(made[1] / "whole")
        assert stored(made[1] / name) == stored(made[1] / "whole")


def test_two_ranks_train_as_one(pool: Pool, made: tuple[Path, Path]) -> None:
    pool.run(pretrained, preference(made, "run.name=two", "run.max_steps=4"), world=2)
    for ours, theirs in zip(figures(made[1] / "two"), figures(made[1] / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_run_ends_when_its_held_out_loss_has_not_fallen(pool: Pool, made: tuple[Path, Path]) -> None:
    """At a rate that is too high; the checkpoint of the lowest loss is kept, and a resumed run stays at its end."""
    rate = "stage.phases.0.lr=[{kind: constant, tokens: 4096, end: 0.03}]"
    options = ("run.name=early", "log.valid_interval=1", rate,
               "checkpoint.interval=0", "checkpoint.keep=1", "checkpoint.keep_best=1")  # fmt: skip
    pool.run(pretrained, preference(made, *options, patience=2), world=1)
    run = made[1] / "early"
    losses = [record["val_loss"] for record in records(run) if "val_loss" in record]
    best, last = 1 + losses.index(min(losses)), len(losses)
    assert len(steps(run)) == last == best + 2 < 16
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{n:08d}" for n in (best, last)}
    pool.run(pretrained, preference(made, *options, "run.resume=auto", patience=2), world=1)
    assert len(steps(run)) == last
    assert json.loads((run / f"checkpoints/step-{last:08d}/meta.json").read_text())["early_stop"]["since"] == 2


def refusal(config: PretrainConfig) -> str:
    before, reference_pass.PART_ROWS = reference_pass.PART_ROWS, PART_ROWS
    try:
        with pytest.raises(ConfigError) as caught:
            prepare_run(plan_launch(config), lambda line: None)
    finally:
        reference_pass.PART_ROWS = before
    return str(caught.value)


def test_another_reference_is_refused(made: tuple[Path, Path]) -> None:
    _, folder = made
    line = refusal(preference(made, "run.name=whole", "run.resume=auto", f"run.init_from={folder}/other"))
    assert line.startswith("run.init_from=") and "trained with another checkpoint as its reference" in line
    shutil.copytree(folder / "whole/reference", folder / "aborted/reference")
    line = refusal(preference(made, "run.name=aborted", f"run.init_from={folder}/other"))
    assert line.startswith("run.init_from=") and "log-probabilities of another checkpoint" in line
    line = refusal(preference(made, "run.name=aborted", "data.seed=5"))
    assert line.startswith("run.name=") and "data_seed differs" in line
    shutil.copytree(folder / "whole", folder / "bare")
    shutil.rmtree(folder / "bare/reference")
    line = refusal(preference(made, "run.name=bare", "run.resume=auto", "run.init_from=null"))
    assert line.startswith("run.init_from=") and "lacks log-probabilities" in line
    line = refusal(preference(made, "run.name=whole", "run.resume=auto", beta=0.1))
    assert line.startswith("stage.preference.beta=0.1") and "was trained with 0.5" in line


def test_what_cannot_be_learned_from_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, folder = made
    assert refusal(preference(made, "run.name=n", "run.init_from=null")).startswith("run.init_from=None")
    questions = [{"question": f"what {i}?", "answer": "that"} for i in range(40)]
    plain = prepared(write_records(tmp_path, questions), tmp_path / "plain", tokenizer=str(corpus)).prefix.parent
    line = refusal(preference((plain, folder), "run.name=n"))
    assert line.startswith(f"data.path={plain}") and "no preference pairs" in line
    for changed, told in (
        ("log.valid_interval=0", "log.valid_interval=0"), ("data.valid_rows=0", "data.valid_rows=0"),
        ("stage.phases.0.transition=0.5", "stage.phases[0].transition"),
    ):  # fmt: skip
        config = preference(made, "run.name=n", "log.valid_interval=1", changed, patience=2)
        assert refusal(config).startswith(told)
    with pytest.raises(ConfigError, match="above 0"):
        preference(made, "run.name=n", beta=0)
    line = refusal(preference(made, "run.name=n", f"run.init_eyes={folder}/other"))
    assert line.startswith("run.init_eyes=") and "which are one checkpoint" in line


def test_pairs_in_a_stage_of_next_tokens_are_warned_of(made: tuple[Path, Path]) -> None:
    corpus, folder = made
    told = f"warning: data.path={corpus}: 72 documents are preference pairs, and this stage learns both answers as text"
    plain = prepare_run(plan_launch(configuration(corpus, folder, "run.name=n")), lambda line: None)
    assert sum(told in line for line in plain.notes) == 1
    paired = prepare_run(plan_launch(preference(made, "run.name=n")), lambda line: None)
    assert not any("as text" in line for line in paired.notes)

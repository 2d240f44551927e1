"""Runs with images: from a text model's weights, stopped and resumed, with what is frozen, and with a broken image."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mmdata.images.grid import TileRules
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmtrain.checkpoint.load import check_same_model
from mmtrain.checkpoint.tensors import StoredTensors
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from tests.data.images.made import prepared, write_images, write_records
from tests.dist.runs import SMALL, pretrain, records, steps
from tests.dist.test_phase_layouts import TIMES
from tests.dist.warm import ROOT

TEXT = [*(one for one in SMALL if not one.startswith(("stage.", "model.vocab"))), "model.vocab_size=320"]
EYES = [
    "model=tiny_vl", "model.vision.image_token=1", "model.vision.tile_size=16", "model.vision.patch_size=8",
    "model.vision.grids=[[1,1],[1,2],[2,1],[2,2]]", "model.vision.hidden_size=16", "model.vision.num_layers=2",
    "model.vision.num_heads=2", "model.vision.ffn_hidden_size=24",
]  # fmt: skip
PHASE = "{name: %s, seq_len: 64, rope_base: 1e4, tokens: 1024, batch: [{at: 0, tokens: 256}], " \
        "lr: [{kind: constant, tokens: 1024, end: 0.01}], frozen: %s, sources: %s}"  # fmt: skip
ALIGNED, TEXT_STEPS = 5, 3  # steps of the first phase (of padded rows); of the run of text


class Made(NamedTuple):
    """Folder of the corpora and runs, and what `vl` printed: a run from the weights of `text`, through two phases."""

    folder: Path
    printed: str

    def at(self, run: str, step: int) -> dict[str, torch.Tensor]:
        """The weights of a run after a step."""
        stored = StoredTensors(self.folder / run / f"checkpoints/step-{step:08d}")
        return {name[6:]: stored.whole(name) for name in stored.shapes if name.startswith("model.")}


def options(folder: Path, name: str, *more: str) -> list[str]:
    """A run with eyes: aligned on images at a fixed resolution with the text frozen, then trained as a whole."""
    phases = (("align", "['*', '!encoder']", f"[{{path: {folder / 'fixed'}}}]"), ("train", "[]", "null"))
    return [*TEXT, *EYES, f"stage.phases=[{','.join(PHASE % phase for phase in phases)}]", "checkpoint.keep=0",
            "checkpoint.interval=1", f"data.path={folder / 'vl'}", f"run.dir={folder}", f"run.name={name}",
            "data.max_epochs=null", f"run.init_from={folder / 'text'}", *more]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("vl")
    names = write_images(folder / "images", [(16 + 2 * i, 30) for i in range(16)])
    file = write_records(folder, [{"image": f"images/{n}", "question": "which?", "answer": n} for n in names])
    prepared(file, folder / "vl", valid_fraction=0.1)
    prepared(file, folder / "fixed", tokenizer=str(folder / "vl"), rules=TileRules(16, 8, ()))
    last = folder / "images" / names[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:60].ljust(len(whole), b"\0"))  # broken since it was prepared
    (folder / "plain").mkdir()
    for i in range(20):
        (folder / f"plain/{i}.txt").write_text(f"text number {i} " * 9)
    prepare(PrepareOptions([folder / "plain"], folder / "words", tokenizer=str(folder / "vl"), workers=1))
    pretrain(*TEXT, f"stage.phases=[{PHASE % ('text', '[]', 'null')}]", f"data.path={folder / 'words'}",
             f"run.max_steps={TEXT_STEPS}", f"run.dir={folder}", "run.name=text")  # fmt: skip
    done = pretrain(*options(folder, "vl"))
    return Made(folder, done.stdout + done.stderr)


def test_eyes_begin_anew_beside_the_weights_of_text(made: Made) -> None:
    assert "run.init_from=" in made.printed and "a model of text; the eyes, " in made.printed
    text, first = made.at("text", TEXT_STEPS), made.at("vl", 1)
    assert {name for name in first if name.startswith("encoder.")} == first.keys() - text.keys() != set()
    for name in text:  # the text is frozen in the first phase, moments and all
        assert torch.equal(text[name], first[name]), name


def test_a_contrastive_head_begins_anew_too(made: Made) -> None:
    given = ["model.vision.contrastive={size: 8}", f"data.path={made.folder / 'fixed'}", "run.max_steps=1"]
    pretrain(*options(made.folder, "contrast", *given))
    text, first = made.at("text", TEXT_STEPS), made.at("contrast", 1)
    assert {name.partition(".")[0] for name in first.keys() - text.keys()} == {"encoder", "contrastive"}
    assert all(torch.equal(text[name], first[name]) for name in text)  # frozen: they were read


def test_what_is_frozen_stays_to_the_bit_and_the_rest_is_trained(made: Made) -> None:
    aligned, end = made.at("vl", ALIGNED), made.at("vl", len(steps(made.folder / "vl")))
    text = made.at("text", TEXT_STEPS)
    assert [step["phase"] for step in steps(made.folder / "vl")].count("align") == ALIGNED
    for name, value in made.at("vl", 1).items():
        assert torch.equal(value, aligned[name]) is not name.startswith("encoder."), name
        assert not torch.equal(aligned[name], end[name]) and (name not in text or torch.equal(text[name], value)), name


@pytest.mark.parametrize("stop", [2, ALIGNED + 1])
def test_a_stopped_run_goes_on_the_same(made: Made, tmp_path: Path, stop: int) -> None:
    stopped = shutil.copytree(made.folder / "vl", tmp_path / "vl")
    for checkpoint in (stopped / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > stop:
            shutil.rmtree(checkpoint)
    pretrain(*options(made.folder, "vl", "run.resume=auto", f"run.dir={tmp_path}"))

    def timeless(run: Path) -> list[dict]:
        found = [{key: value for key, value in one.items() if key not in TIMES} for one in steps(run)]
        return [{key: value for key, value in one.items() if not key.startswith("router")} for one in found]

    assert f" after step {stop}\n" in (stopped / "log.txt").read_text()
    assert timeless(stopped) == timeless(made.folder / "vl")
    last = len(steps(stopped))
    end, again = made.at("vl", last), Made(tmp_path, "").at("vl", last)
    assert all(torch.equal(end[key], again[key]) for key in end)


def test_images_are_counted_and_a_broken_one_told(made: Made) -> None:
    found = steps(made.folder / "vl")
    for step in found[: ALIGNED - 1]:
        assert step["images"] == step["tiles"] > 0 and step["image_tokens"] == 5 * step["images"]
    later = found[ALIGNED + 1 :]
    assert all(step["tiles"] > step["images"] > 0 for step in later)
    broken = sum(step["images_failed"] for step in found)
    reasons = {key for step in found for key in step if key.startswith("images_failed/")}
    assert broken > 0 and reasons and reasons <= {"images_failed/truncated", "images_failed/broken"}
    log = (made.folder / "vl/log.txt").read_text()
    assert "images/15.png: " in log and "grey, and its document not learned" in log
    assert "parameters of text, " in log and " of its eyes, " in log
    assert not any("images" in key for record in records(made.folder / "text") for key in record)


def test_weights_with_eyes_and_without_are_not_exchanged_elsewhere(made: Made) -> None:
    vl = compose(options(made.folder, "x"), ROOT / "configs").model
    text = compose([*TEXT, "data.path=x", "run.name=x"], ROOT / "configs").model
    eyes, words = (made.folder / f"{run}/checkpoints/step-{TEXT_STEPS:08d}" for run in ("vl", "text"))
    check_same_model("run.init_from", words, vl)
    with pytest.raises(ConfigError, match=r"run.resume=.* holds a model of text alone; start another run"):
        check_same_model("run.resume", words, vl)
    with pytest.raises(ConfigError, match=r"model.vision=None: run.init_from=.* holds a model with eyes"):
        check_same_model("run.init_from", eyes, text)
    wider = compose(options(made.folder, "x", "model.vision.hidden_size=32"), ROOT / "configs").model
    with pytest.raises(ConfigError, match=r"model.vision.hidden_size=32: .* holds a model with 16"):
        check_same_model("run.resume", eyes, wider)

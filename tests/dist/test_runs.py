"""Whole runs: process counts, resume, phases, starting from another run, generation, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtrain.checkpoint.lock import RunLock
from mmtrain.checkpoint.manifest import write_manifest
from tests.dist.runs import ROOT, SMALL, environment, pretrain, records, steps

EXACT = ("step", "tokens", "loss", "aux_loss", "lr", "grad_norm", "seq_len", "rope_base", "phase", "drop_rate")


def exact(run: Path) -> list[tuple]:
    return [tuple(record[key] for key in EXACT) for record in steps(run)]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps with two processes."""
    folder = tmp_path_factory.mktemp("reference")
    pretrain(*SMALL, f"data.path={corpus}", f"run.dir={folder}", "run.name=two", "log.plot=true", processes=2)
    return folder / "two"


def test_a_run_learns_and_records_everything(reference: Path) -> None:
    rows = steps(reference)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    needed = {"step", "tokens", "loss", "aux_loss", "lr", "grad_norm", "seq_len", "rope_base", "phase",
              "tokens_per_s", "mfu", "drop_rate", "router_load"}  # fmt: skip
    assert needed <= rows[-1].keys()
    validation = records(reference)[-1]
    assert 0 < validation["val_loss"] < 6 and 0 < validation["val_bits_per_byte"] < 9
    assert (reference / "plot.png").stat().st_size > 10_000
    corpora = json.loads((reference / "corpora.json").read_text())
    meta = json.loads((reference / "checkpoints/step-00000008/meta.json").read_text())
    assert meta["corpora"] == corpora and corpora["sources"][0]["train"]["files"]["bin"]["sha256"]


OTHER_MEMORY = ["parallel.sync_every_micro_batch=true", "parallel.activation_checkpoint=true"]


@pytest.mark.parametrize("extra", [[], pytest.param(OTHER_MEMORY, marks=pytest.mark.slow)])
def test_one_process_gives_the_losses_of_two(reference: Path, corpus: Path, tmp_path: Path, extra: list[str]) -> None:
    pretrain(*SMALL, *extra, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=one", processes=None)
    for mine, theirs in zip(steps(tmp_path / "one"), steps(reference), strict=True):
        for key in ("loss", "aux_loss", "grad_norm", "drop_rate"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), (key, mine["step"])
    mine, theirs = records(tmp_path / "one")[-1], records(reference)[-1]
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-5)


def test_resume_continues_to_the_last_bit(reference: Path, corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=cut"]
    pretrain(*common, "run.max_steps=3", "checkpoint.interval=2", processes=2)
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000003")  # as if killed after step 3: step 3 runs again
    (tmp_path / "cut/checkpoints/step-00000004.writing").mkdir()  # cut short while writing: must not be taken
    shutil.copytree(corpus, tmp_path / "moved")  # the same corpus elsewhere
    done = pretrain(*common, f"data.path={tmp_path}/moved", "run.resume=auto", processes=2)
    assert f"data.path={tmp_path}/moved: the corpus that was at {corpus.resolve()}" in done.stderr
    assert exact(tmp_path / "cut") == exact(reference)
    last, expected = records(tmp_path / "cut")[-1], records(reference)[-1]
    assert {**last, "time": ""} == {**expected, "time": ""}
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {
        "checkpoints",
        "config.json",
        "corpora.json",
        "launches.jsonl",
        "log.txt",
        "metrics.jsonl",
        "tokenizer",
    }
    assert {p.name for p in (tmp_path / "cut/checkpoints").iterdir()} == {"step-00000002", "step-00000008"}


@pytest.mark.slow
def test_phases_change_where_their_tokens_end_and_resume_in_the_second(corpus: Path, tmp_path: Path) -> None:
    common = [option for option in SMALL if not option.startswith("stage")]
    common += ["stage=long_ctx", "stage.scale=1/2048", "stage.batch_scale=1/16", "stage.token_scale=1/15000",
               f"data.path={corpus}", f"run.dir={tmp_path}"]  # fmt: skip
    pretrain(*common, "run.name=whole", processes=2)
    whole = exact(tmp_path / "whole")
    phases = [(row["seq_len"], row["rope_base"], row["phase"]) for row in steps(tmp_path / "whole")]
    assert list(dict.fromkeys(phases)) == [
        (64, 5e6, "ctx_128k"), (256, 1e7, "ctx_512k"), (512, 1e7, "ctx_1m")
    ]  # fmt: skip
    second = next(i for i, phase in enumerate(phases) if phase[0] == 256)
    assert whole[second - 1][1] >= 300e9 / 2048 / 15000  # the first phase's tokens were used up
    pretrain(*common, "run.name=cut", f"run.max_steps={second + 1}", processes=2)
    pretrain(*common, "run.name=cut", "run.resume=auto", processes=2)
    assert exact(tmp_path / "cut") == whole


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_of_another_run(reference: Path, corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.max_steps=1", f"run.init_from={reference}"]
    pretrain(*common, "run.name=next", "data.seed=5", processes=2)
    first = steps(tmp_path / "next")[0]
    assert first["step"] == 1 and first["loss"] == pytest.approx(steps(reference)[-1]["loss"], abs=0.6)
    assert first["loss"] < steps(reference)[0]["loss"] - 0.5


@pytest.mark.slow
def test_generate_continues_a_prompt(reference: Path) -> None:
    command = [sys.executable, "launch/generate.py", str(reference), "--prompt", "alpha be", "--tokens", "5"]
    with ThreadPoolExecutor(2) as both:
        outputs = list(both.map(
            lambda extra: subprocess.run(
                [*command, *extra], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
            ),
            ([], [], ["--temperature", "1", "--top-k", "3", "--top-p", "0.9", "--samples", "2"]),
        ))  # fmt: skip
    assert outputs[0].stdout == outputs[1].stdout and outputs[0].stdout.startswith("alpha be")
    assert outputs[2].stdout.count("alpha be") >= 2
    assert all("5 tokens added" in output.stderr and output.stderr.count("\n") == 1 for output in outputs[:2])


def refused(*overrides: str) -> str:
    """The one line of a refused run; nothing else may be printed."""
    done = pretrain(*overrides, processes=None, check=False)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_an_existing_run_is_neither_overwritten_nor_changed(reference: Path, corpus: Path, tmp_path: Path) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    same = [*SMALL, f"data.path={corpus}", f"run.dir={reference.parent}", "run.name=two", "log.plot=true"]
    assert "run.resume=auto" in refused(*same)
    assert "model.top_k" in refused(*same, "run.resume=auto", "model.top_k=1")
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    (changed / "manifest.json").write_text((changed / "manifest.json").read_text().replace("sha256", "none"))
    tokens = bytearray((changed / "train.bin").read_bytes())
    tokens[0] ^= 1
    (changed / "train.bin").write_bytes(tokens)
    line = refused(*same, f"data.path={changed}", "run.resume=auto")
    assert f"data.path={changed}: it has changed since" in line and "data.allow_changed=true" in line
    assert (reference / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_rewind_writes_one_history_and_a_second_launch_is_refused(corpus: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=r", "checkpoint.interval=2"]
    run, chosen = tmp_path / "r", tmp_path / "r/checkpoints/step-00000002"
    pretrain(*common, "run.max_steps=6", "checkpoint.keep=0", processes=2)
    with RunLock(run, pytest.fail):
        assert f"another launch of this run is at work (pid {os.getpid()} on " in refused(*common, "run.resume=auto")
        done = pretrain(*common, "run.resume=auto", processes=2, check=False)
        told = [line for line in done.stderr.splitlines() if line.startswith("error: run.name=r: another launch")]
        assert done.returncode != 0 and len(told) == 1  # torchrun's own report ends with it once more
    longer = ["run.change_schedule=true", "stage.phases.0.lr.1.end=0.001"]
    done = pretrain(*common, f"run.resume={chosen}", "run.max_steps=5", *longer, processes=2)
    assert "step-00000004, step-00000006, 5 records" in done.stderr  # one of them a validation
    assert "schedule changed from step 2 on: stage.phases[0].lr[1].end 0.0002 -> 0.001" in done.stderr
    assert [row["step"] for row in steps(run)] == [1, 2, 3, 4, 5]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    (aside,) = (run / "abandoned").iterdir()
    assert [row["step"] for row in steps(aside)] == [3, 4, 5, 6]
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.slow
def test_a_run_without_room_goes_on_and_ends_with_code_1(corpus: Path, tmp_path: Path) -> None:
    """No file above 16 KiB can be written, which a shard is and a record is not."""
    options = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=r", "run.max_steps=2"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$@"', "limited", sys.executable, "launch/pretrain.py", *options,
         "checkpoint.interval=1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    first, last = (f"{tmp_path}/r/checkpoints/step-0000000{step} could not be written: " for step in (1, 2))
    assert f"step 1: {first}" in done.stderr and "the run goes on" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {last}")
    assert [row["step"] for row in steps(tmp_path / "r")] == [1, 2]
    assert not list((tmp_path / "r/checkpoints").iterdir()) and not (tmp_path / "r/.lock").exists()


@pytest.mark.slow
def test_a_sweep_of_two_processes_runs_every_point(corpus: Path, tmp_path: Path) -> None:
    """torchrun keeps one store for all points: a group must not read the addresses of the one before."""
    pretrain("-m", "run.seed=1,2", "run.name=s${run.seed}", *SMALL, f"data.path={corpus}", f"run.dir={tmp_path}",
             "run.max_steps=1", processes=2)  # fmt: skip
    assert all(len(steps(tmp_path / name)) == 1 for name in ("s1", "s2"))


@pytest.mark.slow
def test_a_bad_corpus_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    run = [*SMALL, f"run.dir={tmp_path}/runs", "run.name=x"]
    cut = tmp_path / "cut"
    shutil.copytree(corpus, cut)
    (cut / "train.bin").write_bytes((cut / "train.bin").read_bytes()[:-2])
    wrong = {
        "prepare": [f"data.path={tmp_path}/nowhere"],
        "train.bin": [f"data.path={cut}"],
        "model.vocab_size": [f"data.path={corpus}", "model.vocab_size=200"],
        "seq_len": [f"data.path={corpus}", "stage.phases.0.seq_len=1000000"],
    }
    with ThreadPoolExecutor(2) as both:
        for word, line in zip(wrong, both.map(lambda options: refused(*run, *options), wrong.values()), strict=True):
            assert word in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(reference: Path, corpus: Path, tmp_path: Path) -> None:
    line = refused(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=x", "model.ffn_hidden_size=40",
                   f"run.init_from={reference}")  # fmt: skip
    assert "model.ffn_hidden_size" in line
    other = tmp_path / "step-00000008"
    shutil.copytree(reference / "checkpoints/step-00000008", other)
    meta = json.loads((other / "meta.json").read_text())
    meta["corpora"]["tokenizer"] = {"kind": "json", "sha256": "0" * 64, "content": None, "vocab_size": 257}
    (other / "meta.json").write_text(json.dumps(meta))
    write_manifest(other, 8, {})
    line = refused(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=x", f"run.init_from={other}")
    assert "run.init_from" in line and "was trained with a tokenizer.json (257 tokens, sha256 000000000000)" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_batch_where_its_rows_and_tokens_end(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    pretrain(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=a", "run.max_steps=4", processes=2)
    saved = tmp_path / "a/checkpoints/step-00000004"
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=b", f"run.resume={saved}",
              "stage.batch_scale=1/2"]  # fmt: skip
    assert "stage.batch_scale" in refused(*common)
    pretrain(*common, "run.change_schedule=true", processes=2)
    before, after = steps(tmp_path / "a"), steps(tmp_path / "b")
    assert [row["first_row"] for row in after] == list(range(32, 64, 4)) and {row["rows"] for row in after} == {4}
    assert [row["tokens"] for row in after] == [2048 + 256 * i for i in range(1, 9)]
    whole = steps(reference)  # the same rates at the same tokens, whatever the batch
    assert after[1]["lr"] == whole[4]["lr"] and after[-1]["lr"] == whole[-1]["lr"] != before[-1]["lr"]


@pytest.mark.slow
def test_two_launches_of_one_configuration_are_bitwise_equal(reference: Path, corpus: Path, tmp_path: Path) -> None:
    pretrain(*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "run.name=again", "data.num_workers=1", processes=2)
    assert exact(tmp_path / "again") == exact(reference)
    assert json.loads((tmp_path / "again/config.json").read_text())["run"]["name"] == "again"


@pytest.mark.slow
def test_host_memory_optimizer_follows_adamw_and_resumes(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}"]
    pretrain(*common, "run.name=adamw", processes=2)
    pretrain(*common, "run.name=host", "optim=cpu_offload", "optim.precision=fp32", processes=2)
    for mine, theirs in zip(steps(tmp_path / "host"), steps(tmp_path / "adamw"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    cut = [*common, "run.name=cut", "optim=cpu_offload", "optim.precision=fp32"]
    pretrain(*cut, "run.max_steps=3", processes=2)
    pretrain(*cut, "run.resume=auto", processes=2)
    assert exact(tmp_path / "cut") == exact(tmp_path / "host")

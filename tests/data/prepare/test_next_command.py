"""The closing line of launch/prepare.py is a command that works when it is pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmdata.corpus.manifest import Manifest, SplitInfo
from mmdata.prepare.next_command import hydra_quoted, next_command
from mmtrain.config.cli import compose
from mmtrain.train.curriculum import RunPlan, scaled_phases
from tests.data.prepare.test_prepare import ROOT, environment


def manifest(tokens: int, vocab_size: int = 4096) -> Manifest:
    return Manifest("", {}, vocab_size, 0, "uint16", {"train": SplitInfo(1, 1, tokens, 1)}, {}, {})


PATHS = ["corpora/mine", "/data/my texts", "a=b,c", "it's", 'say "hi"', "[x]{y}", "2026_11_28", "$HOME", "${x}", "null",
         "ünï", "a(b)", "tail\\", "#1", "a:b", "~/x", "*", "-x"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_any_path_comes_through(path):
    words = shlex.split(next_command(manifest(10**7), Path(path), gpus=0))
    overrides = words[words.index("launch/pretrain.py") + 1 :]
    config = compose(overrides, ROOT / "configs")
    assert config.data.path == str(Path(path)) and config.run.name.startswith("first")


@pytest.mark.parametrize("tokens", [20, 300, 2000, 20_000, 300_000, 10**9])
@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_sizes_fit_the_corpus_and_the_machine(tokens, gpus):
    words = shlex.split(next_command(manifest(tokens, 257 + tokens % 9000), Path("c"), gpus=gpus))
    processes = int(words[words.index("--nproc-per-node") + 1])
    assert processes == {0: min(2, len(os.sched_getaffinity(0))), 3: 2}.get(gpus, gpus)
    config = compose(words[words.index("launch/pretrain.py") + 1 :], ROOT / "configs")
    phases = scaled_phases(config.stage)
    plan = RunPlan(phases, processes, config.parallel.micro_batch_rows)  # raises if the rows do not come out even
    assert plan is not None and config.model.vocab_size >= 257 + tokens % 9000
    assert phases[0].seq_len <= max(tokens // 4, 16) and phases[0].seq_len <= 512
    assert phases[0].tokens <= max(8 * tokens, 60 << 10)


def test_plain_words_stay_plain():
    assert hydra_quoted("corpora/my-text_2.v1") == "corpora/my-text_2.v1"
    assert hydra_quoted("1e5") == '"1e5"' and hydra_quoted("True") == '"True"'


def test_help_needs_nothing_but_python():
    """No import but of the standard library: it answers at once on the slowest disk."""
    command = [sys.executable, "-I", "-S", str(ROOT / "launch/prepare.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--separator" in done.stdout and not done.stderr


@pytest.mark.slow
def test_the_line_trains_as_printed(tmp_path):
    texts = tmp_path / "my texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(f"line {i} of a small text, {i * i}" for i in range(400)))
    command = [sys.executable, str(ROOT / "launch/prepare.py"), "--input", str(texts), "--output", "my corpus, v=1"]
    command += ["--tokenizer", "bytes", "--separator", r"\n\n", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    line = done.stdout.splitlines()[2].partition("; next: ")[2]
    env = environment() | {"PYTHONPATH": f"{ROOT}/kernels:{environment()['PYTHONPATH']}", "WANDB_MODE": "disabled"}
    ran = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "runs" / "first" / "metrics.jsonl").stat().st_size > 0

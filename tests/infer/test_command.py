"""`launch/generate.py`: what it writes, and what it refuses in one line, with its exit codes."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmtrain.infer import load, write
from mmtrain.infer.request import Request
from mmtrain.infer.sampling import TEMPERATURE, TOP_P, Sampling
from tests.infer.chain import TEXT, chain_model, file_tokenizer, save_run
from tests.infer.conftest import SCRIPT

Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]


def test_text_comes_out_to_the_end_of_the_document(run: Path, main: Main, capsys: Capture) -> None:
    assert main([str(run), "--prompt", "n"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{TEXT}\n"  # sampled, but the model is sure
    assert "step-00000004 on" in err and "10 tokens added" in err and "end of document" in err
    assert main([str(run), "--prompt", "n", "--greedy", "--quiet", "--no-echo"]) == 0
    assert capsys.readouterr() == (f"{TEXT[1:]}\n", "")
    assert main([str(run / "checkpoints"), "--prompt", "n", "--greedy", "--tokens", "4", "--quiet"]) == 0
    assert capsys.readouterr().out == "né\ufffd\n"  # two of three bytes of a character


def test_prompts_of_standard_input_files_and_nothing(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("né\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main([str(run), "--greedy", "--quiet"]) == 0
    (tmp_path / "prompt.txt").write_text("né€\n", encoding="utf-8")
    assert main([str(run), "--greedy", "--quiet", "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    assert main([str(run), "--greedy", "--prompt", ""]) == 0  # starts from EOD, which is not written
    out, err = capsys.readouterr()
    assert out.splitlines() == [TEXT] * 3
    assert "note: the prompt is empty" in err


def test_ignoring_the_end_neither_stops_nor_writes_it(run: Path, main: Main, capsys: Capture) -> None:
    assert main([str(run), "--prompt", "n", "--greedy", "--ignore-eod", "--tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(TEXT) and "20 tokens added" in err and "end of document" not in err
    assert main([str(run), "--prompt", "!", "--greedy", "--ignore-eod", "--tokens", "1"]) == 0
    assert len(capsys.readouterr().out) == 3  # a token that the tokenizer has, though another id is likelier


def test_samples_stand_apart_with_their_seeds(run: Path, main: Main, capsys: Capture) -> None:
    args = [str(run), "--prompt", "n", "--temperature", "20", "--quiet", "--tokens", "8", "--ignore-eod"]
    assert main([*args, "--samples", "3", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        f"--- sample {i + 1} of 3, seed {5 + i}" for i in range(3)
    ]
    assert main([*args, "--seed", "6"]) == 0
    assert f"seed 6\n{capsys.readouterr().out}\n--- sample 3" in out  # a prompt read once gives what it gives alone


def test_a_terminal_is_told_nothing_that_it_would_obey(run: Path, tmp_path: Path, main: Main) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    save_run(tmp_path, chain_model("a\x1b[b\tc\x07"))
    opened = load.open_checkpoint(tmp_path)
    model = load.load_weights(opened, torch.device("cpu"))
    for out, text in ((Terminal(), "a\\x1b[b\tc\\x07\n"), (io.StringIO(), "a\x1b[b\tc\x07\n")):
        write.write_samples(model, opened.tokenizer, Request("a", 20, Sampling()), out)
        assert out.getvalue() == text


WRONG = {
    "--tokens 0": "--tokens=0: must be at least 1",
    "--tokens -3": "--tokens=-3: must be at least 1",
    "--tokens many": "argument --tokens: invalid int value",
    "--samples 0": "--samples=0: must be at least 1",
    "--samples 2 --greedy": "--samples=2: greedy decoding makes the same text",
    "--seed -1": r"--seed=-1: must lie in \[0, 2\^63\)",
    "--seed 9223372036854775807 --samples 2": "--seed=9223372036854775807: must lie",
    "--temperature -1": "--temperature=-1.0: must be a number of at least 0",
    "--temperature nan": "--temperature=nan: must be",
    "--temperature inf": "--temperature=inf: must be",
    "--temperature 1 --greedy": "--temperature=1.0: has no effect with --greedy",
    "--top-k 0": "--top-k=0: must be at least 1",
    "--top-p 0": r"--top-p=0.0: must lie in \(0, 1\]",
    "--top-p 1.5": "--top-p=1.5: must lie",
    "--top-p nan": "--top-p=nan: must lie",
    "--rope-base nan": "--rope-base=nan: must be above 1",
    "--rope-base inf": "--rope-base=inf: must be above 1",
    "--stop a\udcff": r"--stop='a\\udcff': is not UTF-8 text .at character 1",
    "--chat --user \udcff{}": r"--user='\\udcff{}': is not UTF-8 text",
    "--device gpu": "--device=gpu: not a device",
    "--device mps": "--device=mps: not a device",
    "--device meta": "--device=meta: not a device",
    "--device cuda:-1": "--device=cuda:-1: not a device",
    "--device cuda:99": "--device=cuda:99: torch sees",
    "--prompt-file gone.txt": "--prompt-file.*not allowed with argument --prompt",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_one_line_before_the_checkpoint_is_read(
    options: str, run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(load, "open_checkpoint", read)
    try:
        code = main([str(run), "--prompt", "n", *options.split()])
    except SystemExit as end:  # argparse's own
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    with pytest.raises(ValueError, match=WRONG[options]):
        raise ValueError(err)


def test_a_gpu_that_is_not_there_is_one_line(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, name, told in ((0, "cuda", "sees no GPU"), (1, "cuda:7", "give cuda:0\n"), (2, "cuda:2", "to cuda:1\n")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        assert main([str(run), "--prompt", "n", "--device", name]) == 2
        assert told in capsys.readouterr().err


def test_checkpoints_that_cannot_be_decoded_are_one_line(
    run: Path, main: Main, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *options: str) -> str:
        assert main([str(path), "--prompt", "n", "--greedy", *options]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "no such folder" in refused(tmp_path / "gone")
    assert "holds no complete checkpoint" in refused(tmp_path)
    assert "was trained with the byte tokenizer" in refused(run, "--tokenizer", str(file_tokenizer(tmp_path / "a")))
    broken = chain_model()
    broken.layers[1].mixer.o_proj.weight.data[3, 5] = float("nan")
    save_run(tmp_path / "nan", broken)
    assert "not finite numbers (layers.1.mixer.o_proj.weight)" in refused(tmp_path / "nan")
    huge = chain_model()
    huge.lm_head.weight.data.fill_(3e38)
    save_run(tmp_path / "huge", huge)
    assert "logits that are not finite" in refused(tmp_path / "huge")
    cut = shutil.copytree(run, tmp_path / "cut")
    shard = max(cut.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:2000])
    assert str(cut) in refused(cut)
    monkeypatch.setattr("mmtrain.infer.memory.free_bytes", lambda device: 1000)
    assert "GiB of memory free, the weights take" in refused(run)


def test_a_prompt_without_tokens_is_refused_before_the_weights_are_read(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdata.tokenizer.ByteTokenizer.encode", lambda self, text: [])
    monkeypatch.setattr(load, "load_weights", lambda *args: pytest.fail("the weights were read"))
    assert main([str(run), "--prompt", "n"]) == 2
    assert "makes no token of it" in capsys.readouterr().err


def test_a_prompt_beyond_the_memory_is_one_line(
    run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("mmtrain.infer.serving.runner.Runner._pass", fail)
    assert main([str(run), "--prompt", "nn", "--device", "cpu"]) == 2
    assert "--prompt=2 tokens: does not fit into the memory of cpu" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(run: Path, main: Main, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for place in ("mmtrain.infer.serving.runner.Runner.run", "torch.distributed.checkpoint.FileSystemReader.read_data"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert main([str(run), "--prompt", "n"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


def test_help_needs_no_torch_and_tells_the_defaults() -> None:
    code = "import runpy, sys\nsys.argv = ['g', '--help']\ntry:\n    "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code += "\nexcept SystemExit:\n    assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    paths = [SCRIPT.parents[1], SCRIPT.parents[1] / "data", SCRIPT.parents[1] / "kernels"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"0 is greedy (default {TEMPERATURE})" in done.stdout and f"this sum (default {TOP_P})" in done.stdout


def test_a_reader_that_goes_away_ends_it_quietly(run: Path, tmp_path: Path) -> None:
    """Run it as a process, from a folder that knows nothing of the run."""
    paths = [SCRIPT.parents[1], SCRIPT.parents[1] / "data", SCRIPT.parents[1] / "kernels"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(SCRIPT), str(run), "--ignore-eod", "--tokens", "100000", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"n\n")
    process.stdin.close()
    assert process.stdout.read(len(TEXT.encode())) == TEXT.encode()  # before all tokens are there
    process.stdout.close()
    assert process.wait(timeout=300) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()

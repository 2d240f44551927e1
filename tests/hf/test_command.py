"""launch/convert.py: what it writes, what it says, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmdata.tokenizer import ByteTokenizer, FileTokenizer
from mmtrain.hf import check, tokenizer_files, transformers_logits
from mmtrain.hf.check import Trial, try_transformers
from mmtrain.hf.folder import open_folder
from mmtrain.hf.tokenizer_files import TextFiles, byte_tokenizer_json
from mmtrain.infer.load import load_for_decoding
from tests.hf.folders import PLAIN
from tests.infer.chain import CONFIG, EOD, TEXT, chain_model, file_tokenizer, save_run

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "convert.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose greedy continuation is known."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    save_run(folder, chain_model(certainty=3.0))
    return folder


@pytest.fixture
def main() -> Callable[..., int]:
    """The launcher's main function, called in this process, without a trial unless asked for."""
    spec = importlib.util.spec_from_file_location("launch_convert", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, trial: bool = False) -> int:
        try:
            return module.main([*map(str, arguments), *([] if trial else ["--no-trial"])])
        finally:
            signal.signal(signal.SIGTERM, before)

    return call


def test_an_exported_run_continues_text_in_transformers(
    run: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "m"
    assert main(run, out, "--to", "hf", "--dtype", "float32", "--shard-size", "0.05MB") == 0
    said = capsys.readouterr()
    checkpoint = run / "checkpoints/step-00000004"
    assert said.out.startswith(f"{checkpoint} -> {out}: ") and said.out.count("\n") == 1
    assert f"next: transformers' AutoModelForCausalLM.from_pretrained('{out}'), or run.init_from={out}" in said.out
    assert "byte tokenizer" in said.err and "rows of q_proj and k_proj are reordered" in said.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.eos_token_id, model.config.bos_token_id, tokenizer.eos_token_id) == (EOD, None, EOD)
    prompt = tokenizer("n", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[ord("n")]]
    told = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    assert told == [*TEXT.encode(), EOD]  # stops where the text does
    assert tokenizer.decode(told, skip_special_tokens=True) == TEXT
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == EOD
    assert main(out, tmp_path / "again", "--to", "minimax") == 0
    again = open_folder("x", tmp_path / "again")
    ours, by_file = load_for_decoding(out, device="cpu")
    assert by_file.encode("n") == [ord("n")] and ours.config.rotary_dim == CONFIG.rotary_dim
    expected, _ = load_for_decoding(run, device="cpu")
    for mine, theirs in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.config["eos_token_id"] == EOD and again.config["mmtrain"]["tokenizer"] == "bytes"
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert "next: vllm serve" in capsys.readouterr().out


def test_the_byte_tokenizer_s_file_gives_its_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_json())
    theirs, ours = FileTokenizer(tmp_path / "tokenizer.json"), ByteTokenizer()
    assert (theirs.vocab_size, theirs.eod_id) == (ours.vocab_size, ours.eod_id)
    rng = random.Random(0)
    texts = ["", " a  b\n\tc", *("".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(160, 0xD7FF)]))
                                         for _ in range(60)) for _ in range(20))]  # fmt: skip
    for text in texts:
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text


def test_a_tokenizer_brings_its_chat_template(main: Callable[..., int], tmp_path: Path) -> None:
    files = file_tokenizer(tmp_path / "tokenizer")
    (files / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run = tmp_path / "run"
    save_run(run, chain_model(), tokenizer=False, data={"tokenizer": str(files)})
    assert main(run, tmp_path / "m", "--to", "minimax") == 0
    assert (tmp_path / "m/chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (tmp_path / "m/tokenizer.json").read_bytes() == (files / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text())["eos_token"] == "<end_of_document>"


def test_the_end_of_text_is_the_tokenizer_s_and_the_released_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "RELEASED_EOS", 257)  # a small vocabulary does as well
    plain = FileTokenizer(file_tokenizer(tmp_path / "plain") / "tokenizer.json")
    assert TextFiles.of_run(plain, None).eos == EOD
    spec = json.loads((tmp_path / "plain/tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 257, "content": "<end_of_sentence>"})
    (tmp_path / "plain/tokenizer.json").write_text(json.dumps(spec))
    released = FileTokenizer(tmp_path / "plain/tokenizer.json")
    assert TextFiles.of_run(released, None).eos == [EOD, 257]


def test_bad_input_is_told_in_a_line(
    run: Path, main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    cases = [
        ((run, tmp_path / "there", "--to", "hf"), "is there already"),
        ((tmp_path / "gone", tmp_path / "m", "--to", "hf"), "no such folder"),
        ((run, tmp_path / "m", "--to", "hf", "--shard-size", "big"), "must be a size"),
        ((run, tmp_path / "m", "--to", "minimax", "--plain-rope"), "leave it out"),
        ((tmp_path / "there", tmp_path / "m", "--to", "hf"), "holds no complete checkpoint"),
    ]
    for arguments, told in cases:
        assert main(*arguments) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and told in line and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_transformers_would_compute_otherwise_is_refused(
    run: Path,
    main: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "try_transformers", lambda model, target: Trial(error=0.3))
    assert main(run, tmp_path / "m", "--to", "hf", "--plain-rope", trial=True) == 2
    line = capsys.readouterr().err
    assert "would compute something else" in line and "differ by 3.0e-01" in line and "leave out --plain-rope" in line
    assert not (tmp_path / "m").exists()
    for trial, told in (
        (None, "not tried"),
        (Trial(problem="no such model"), "cannot read this format: no such model"),
    ):
        monkeypatch.setattr(check, "try_transformers", lambda model, target, trial=trial: trial)
        assert main(run, tmp_path / f"m-{trial is None}", "--to", "hf", trial=True) == 0
        assert told in capsys.readouterr().err


def in_this_process(command: list[str], **options: object) -> subprocess.CompletedProcess:
    """The trial's process, without the seconds that an import of transformers takes."""
    transformers_logits.main(*command[3:])
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.mark.slow
def test_a_trial_in_its_own_process() -> None:
    assert try_transformers(CONFIG, replace(PLAIN, plain_rope=False)).agrees


def test_the_trial_tells_a_rope_that_the_installed_transformers_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.subprocess, "run", in_this_process)
    model = replace(CONFIG, num_heads=3, num_kv_heads=1)  # slopes that it would not derive itself, too
    assert try_transformers(model, replace(PLAIN, plain_rope=False)).agrees
    plain = try_transformers(model, PLAIN)
    assert plain.problem == "" and (plain.error < 1e-5 or not plain.agrees)

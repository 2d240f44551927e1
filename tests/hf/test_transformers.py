"""Exported folders in transformers: the same logits, and text that goes on as ours does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MiniMaxForCausalLM

from mmtrain.hf.check import TOLERANCE
from mmtrain.hf.folder import open_folder
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.packed_seq import Packing
from tests.hf.folders import PLAIN, SHAPES, made, write
from tests.model.small import draw, draw_tokens, relative

FP32 = 1e-5  # of the norm of the logits


def load(folder: Path, **options: object) -> nn.Module:
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert isinstance(theirs, MiniMaxForCausalLM)
    assert not any(report.values()), report  # nothing missing, left over, or of another shape
    return theirs.eval()


@torch.no_grad()
def error(model: nn.Module, theirs: nn.Module, length: int = 300) -> float:
    tokens = draw_tokens(length)
    return relative(theirs(input_ids=tokens[None]).logits[0], model(tokens, Packing.from_lengths([length])))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = made(shape).eval()
    for target in ("hf", "hf-stacked"):
        folder = write(model, tmp_path / target, target, shard_bytes=100_000)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert error(model, load(folder)) < FP32


def test_the_only_expert_of_a_dense_layer_weighs_exactly_1(tmp_path: Path) -> None:
    theirs = load(write(made("dense, 6 heads, lightning last"), tmp_path / "m"))
    _, weights, _ = theirs.model.layers[0].mlp.gate(draw(50, 48, dtype=torch.float32) * 100)
    assert weights.shape == (50, 1) and (weights == 1).all()


def test_logits_of_bfloat16_weights_equal_transformers_in_float32(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated").eval()
    folder = write(model, tmp_path / "m", dtype=torch.bfloat16)
    half = load(folder)
    assert half.dtype == torch.bfloat16 and error(model, half) < 0.1  # its decays are rounded too, and all products
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert error(model, load(folder, dtype=torch.float32)) < FP32


def test_a_rope_that_transformers_does_not_know_is_seen(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
    found = error(model, load(write(model, tmp_path / "m", PLAIN)))
    # A transformers that knows partial RoPE of this model is welcome: then the rows need no other order.
    assert found < FP32 or found > 10 * TOLERANCE
    assert error(model, load(write(model, tmp_path / "r"))) < FP32


def test_generate_continues_as_our_own_greedy_decoding(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated").eval()
    theirs = load(write(model, tmp_path / "m"))
    prompt, count = draw_tokens(20, seed=3), 12
    ours = prompt
    with torch.no_grad():
        for _ in range(count):
            ours = torch.cat([ours, model(ours, Packing.from_lengths([len(ours)]))[-1].argmax()[None]])
    found = theirs.generate(prompt[None], max_new_tokens=count, do_sample=False)
    assert found[0].tolist() == ours.tolist()


def test_the_engine_generates_as_transformers_does(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated").eval()
    theirs = load(write(model, tmp_path / "m"))
    prompts = [tuple(draw_tokens(length, seed=length).tolist()) for length in (20, 3, 41)]
    options = EngineOptions(memory_bytes=1 << 22, page_tokens=8, prefill_tokens=16)
    found = Engine(model, options=options).generate([GenerationRequest(prompt, 12) for prompt in prompts])
    for prompt, one in zip(prompts, found, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert [*prompt, *one.tokens] == expected[0].tolist()


def test_names_are_those_that_transformers_saves_and_its_folders_come_back(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated")
    folder = write(model, tmp_path / "ours")
    theirs = load(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, saved = (open_folder("x", tmp_path / name) for name in ("ours", "theirs"))
    assert {name: entry.shape for name, (_, entry) in ours.places.items()} == {
        name: entry.shape for name, (_, entry) in saved.places.items()
    }
    assert saved.model == ours.model and saved.reordered and not saved.stacked
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert open_folder("x", tmp_path / "stacked").stacked

"""The plan of serving: the released model's figures from its real shapes, and ours to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.memory import weight_bytes
from mmtrain.infer.plan import main
from mmtrain.infer.planning.plan import plan_serving
from mmtrain.infer.planning.weights import ServingLayout, local_shape, weight_bytes_on
from mmtrain.infer.quantised.stream import served_model
from mmtrain.infer.serving.memory_plan import copies_bytes, without_copies
from mmtrain.infer.serving.options import EngineOptions
from tests.infer.served import MODELS, SMALL
from tests.model.small import small_config, small_model

ROOT = Path(__file__).resolve().parents[3]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    words = ["model=minimax_text_01", "run.name=x", "run.plan=true", "data.path=x"]
    return compose(words, ROOT / "configs").model


def test_the_released_model_at_a_million_tokens_on_8_x_80_gb(released: ModelConfig) -> None:
    """456 GB of weights, 41 GB of keys and 0.3 GB of states (MiniMax-01 and the sizes that its config.json gives)."""
    layout = ServingLayout(8, 8)
    plan = plan_serving(released, layout, "int8", 1_000_000, 80 * GB)
    int8 = sum(plan.weights[part] for part in ("mixers", "experts")) * 8
    assert int8 == pytest.approx(456e9 - 2 * 200064 * 6144, rel=0.002)  # but for embedding and head, which stay bf16
    assert plan.weights_bytes * 8 == pytest.approx(456e9 + 2 * 200064 * 6144, rel=0.003)
    assert plan.keys_bytes * 8 == 2 * 8 * 128 * 10 * 1_000_000 * 2  # 40.96 GB
    assert plan.states_bytes * 8 == 70 * 64 * 128 * 128 * 4  # 0.294 GB
    assert plan.fits and plan.used_bytes < 80 * GB and 2_000_000 < plan.longest < 4_000_000
    assert not plan_serving(released, layout, "bf16", 1_000_000, 80 * GB).fits  # 912 GB of weights
    assert not plan_serving(released, ServingLayout(4, 4), "int8", 1_000_000, 80 * GB).fits
    assert plan_serving(released, layout, "int8", 4_000_000, 141 * GB).fits  # H200s


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int8-g128"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_on_one_device_are_those_of_the_model_to_the_byte(name: str, precision: str) -> None:
    config = small_config(**(MODELS[name] | dict(hidden_size=160)))
    for device in (CPU, GPU):
        planned = weight_bytes_on(config, ServingLayout(), precision, device)
        assert sum(planned.values()) == weight_bytes(served_model(config, precision, device))


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_the_parts_of_all_devices_are_the_model(tp: int, ep: int) -> None:
    config = small_config(num_layers=3, layer_pattern="LS", shared_ffn_hidden_size=24)
    layout = ServingLayout(tp, ep)
    layout.check(config)
    for name, parameter in meta_model(config).named_parameters():
        parts = parameter.numel() / torch.Size(local_shape(config, layout, name, tuple(parameter.shape))).numel()
        everywhere = ("norm" in name and "mixer" not in name) or "router" in name or "coefficient" in name
        shared_heads = tp > config.num_kv_heads and (".k_proj" in name or ".v_proj" in name)
        assert parts == (1 if everywhere or shared_heads else tp), name


def test_keys_and_states_are_those_that_the_engine_takes() -> None:
    model = small_model(**MODELS["hybrid with experts"])
    plan = plan_serving(model.config, ServingLayout(), "bf16", 50, GB, replace(SMALL, max_running=3))
    engine = Engine(model.bfloat16(), options=replace(SMALL, max_running=3))
    taken = [value for layer in engine.memory.layers for value in vars(layer).values()]
    keys = sum(value.nbytes for value in taken if value.dtype == torch.bfloat16)
    assert plan.keys_bytes == keys // engine.plan.pages * 3 * 13  # 13 pages of 4 tokens hold 50
    assert plan.states_bytes == sum(value.nbytes for value in taken) - keys


def test_the_longest_context_fits_and_no_longer_one() -> None:
    config = small_config(num_layers=4, layer_pattern="LS")
    options = EngineOptions(max_running=2, prefix_slots=0, page_tokens=16, prefill_tokens=64)
    plan = plan_serving(config, ServingLayout(), "int8", 1, 200_000_000, options)
    assert plan.longest % 16 == 0
    for tokens, fits in ((plan.longest, True), (plan.longest + 1, False)):
        assert plan_serving(config, ServingLayout(), "int8", tokens, 200_000_000, options).fits == fits
    at = plan_serving(config, ServingLayout(), "int8", plan.longest, 200_000_000, options)
    free = 0.8 * (200_000_000 - at.weights_bytes - at.step_bytes)
    assert 0.99 * free < at.keys_bytes + at.states_bytes + at.copies_bytes <= free
    assert plan_serving(config, ServingLayout(), "int8", 1, 1_000_000, options).longest == 0  # not even the weights
    lightning = small_config(num_layers=4, layer_pattern="L")
    assert plan_serving(lightning, ServingLayout(), "int8", 10**9, 200_000_000).longest is None


def test_copies_are_what_a_budget_is_cut_by() -> None:
    config = small_config(num_layers=6, layer_pattern="LLS")
    assert without_copies(config, 1200) == 800 and copies_bytes(config, 800) == 400  # of two layers, one
    lightning = small_config(num_layers=2, layer_pattern="L")
    assert without_copies(lightning, 1000) == 1000 and copies_bytes(lightning, 0) == 0


@pytest.mark.parametrize(
    ("layout", "option"),
    [((0, 1), "--tp"), ((3, 1), "--tp"), ((16, 1), "--tp"), ((4, 3), "--ep"), ((8, 8), "--tp"), ((2, 0), "--ep")],
)
def test_layouts_that_cannot_be(layout: tuple[int, int], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_serving(small_config(), ServingLayout(*layout), "int8", 100, GB)
    assert str(caught.value).startswith(option)


ARGUMENTS = ["hybrid_7b", "--configs", str(ROOT / "configs"), "--tokens", "100000", "--tp", "2"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["tp"], found["ep"], found["fits"]) == ("hybrid_7b", 2, 1, True)
    assert found["used_bytes"] == sum(
        found[f"{part}_bytes"] for part in ("weights", "keys", "states", "copies", "step")
    )
    assert main(ARGUMENTS) == 0
    table = capsys.readouterr().out
    assert table.startswith("hybrid_7b, int8 weights, 1 x 100,000 tokens, on 2 GPUs of 80 GB") and "longest" in table
    assert main([*ARGUMENTS, "--memory-gb", "4"]) == 1
    assert capsys.readouterr().out.endswith("the requests do not fit\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory-gb", "nan"], "--memory-gb=nan"),
        (["--requests", "0"], "--requests=0"),
        (["--tokens", "0"], "--tokens=0"),
        (["--tp", "3"], "--tp=3"),
        (["--configs", "nowhere"], "--configs=nowhere"),
    ],
)
def test_wrong_arguments(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_run_s_folder_names_its_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--json", "--tokens", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "small"

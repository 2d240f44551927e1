"""The registry of mixers: a third, known by its entry alone, is a mixer everywhere; an unknown letter is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from mmtrain.build import build_model, meta_model
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters, step_flops
from mmtrain.model.mixers.registry import MIXERS, check_layer_pattern, mixer_spec
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.pipeline.split import layer_costs
from tests.model.mixers.decoding import OneDocument
from tests.model.mixers.running_mean import RunningMean, RunningMeanSlots, registered
from tests.model.small import draw_tokens, small_config

PATTERN, LENGTHS = "LMS", [5, 1, 30, 12]
D, INNER = 48, 64


@pytest.fixture
def third() -> Iterator[ModelConfig]:
    """A model with layers of all three kinds."""
    with registered():
        yield small_config(num_layers=4, layer_pattern=PATTERN)


def spans(lengths: list[int]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def test_the_layers_are_of_their_letters_kinds(third: ModelConfig) -> None:
    model = meta_model(third)
    assert [isinstance(layer.mixer, RunningMean) for layer in model.layers] == [False, True, False, False]
    assert [layer.spec.name for layer in model.layers] == ["lightning", "running_mean", "softmax", "lightning"]


def test_its_parameters_are_counted(third: ModelConfig) -> None:
    count = count_parameters(third)
    assert count.by_part["running_mean"] == 2 * D * INNER + INNER
    assert count.total == sum(parameter.numel() for parameter in meta_model(third).parameters())


def test_its_operations_are_counted_by_part(third: ModelConfig) -> None:
    tokens = sum(LENGTHS)
    parts, all_lightning = (step_flops(c, LENGTHS).by_part for c in (third, replace(third, layer_pattern="L")))
    assert parts["running_mean_projections"] == 2 * tokens * 2 * D * INNER
    assert parts["running_mean_attention"] == 2 * tokens * INNER
    assert parts["lightning_projections"] * 2 == all_lightning["lightning_projections"]
    assert all_lightning["running_mean_projections"] == all_lightning["running_mean_attention"] == 0


def test_the_pipeline_splits_by_its_cost(third: ModelConfig) -> None:
    costs, head = layer_costs(third, 64)
    assert sum(costs) + head == step_flops(third, [64]).forward
    mixing = [2 * 64 * 5 * D * INNER + 4 * 64 * INNER * 16, 2 * 64 * 2 * D * INNER + 2 * 64 * INNER]
    assert costs[0] - costs[1] == mixing[0] - mixing[1]


def test_packed_documents_do_not_see_each_other(third: ModelConfig) -> None:
    model, packing = build_model(third), Packing.from_lengths(LENGTHS)
    tokens = draw_tokens(sum(LENGTHS))
    with torch.no_grad():
        before = model(tokens, packing)
        for document in spans(LENGTHS):
            changed = tokens.clone()
            changed[document.start] = (changed[document.start] + 1) % 160
            difference = (model(changed, packing) - before).abs().amax(-1)
            assert (difference[document] > 0).all()
            difference[document] = 0
            assert torch.count_nonzero(difference) == 0


def test_a_step_of_gradient_descent_lowers_the_loss(third: ModelConfig) -> None:
    model, packing, tokens = build_model(third), Packing.from_lengths(LENGTHS), draw_tokens(sum(LENGTHS))
    losses = []
    for _ in range(2):
        loss = model(tokens, packing, tokens.roll(-1)).ce_sum / len(tokens)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad.abs().max() > 0, name
                parameter -= 0.02 * parameter.grad
                parameter.grad = None
    assert losses[1] < losses[0]


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 12]])
def test_decoding_gives_the_logits_of_the_whole_document(third: ModelConfig, pieces: list[int]) -> None:
    model, tokens = build_model(third).eval(), draw_tokens(20)
    document = OneDocument(model)
    assert isinstance(document.layers[1], RunningMeanSlots)
    with torch.no_grad():
        full = model(tokens, Packing.from_lengths([20]))
        cached = torch.cat([document.read(part) for part in tokens.split(pieces)])
    assert document.length == 20
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=2e-5)


def test_a_size_of_tensor_parallelism_that_does_not_divide_its_heads_is_refused(third: ModelConfig) -> None:
    alone = replace(third, layer_pattern="M")
    assert plan_layout(4, ParallelConfig(tp=4), alone).tp == 4
    with pytest.raises(ConfigError, match="num_heads 4 / tp 8") as caught:
        plan_layout(8, ParallelConfig(tp=8), alone)
    assert caught.value.option == "parallel.tp"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_mixers_entry_fits_its_module(third: ModelConfig, tp: int, kv_heads: int) -> None:
    config = replace(third, num_kv_heads=kv_heads)
    for letter, spec in MIXERS.items():
        mixer = meta_model(replace(config, layer_pattern=letter, num_layers=1)).layers[0].mixer
        shapes = {name: parameter.shape for name, parameter in mixer.named_parameters()}
        assert spec.letter == letter
        assert spec.placements(config, tp).keys() == shapes.keys()
        assert spec.matrix_weights(config) == sum(shape.numel() for shape in shapes.values() if len(shape) == 2)
        assert spec.vector_weights(config) == sum(shape.numel() for shape in shapes.values() if len(shape) == 1)


@pytest.mark.parametrize(
    "use",
    [
        check_layer_pattern,
        meta_model,
        count_parameters,
        lambda config: step_flops(config, [8]),
        lambda config: plan_layout(1, ParallelConfig(), config),
        lambda config: mixer_spec(config.layer_pattern[1]),
    ],
    ids=["check", "model", "parameters", "operations", "layout", "spec"],
)
def test_an_unknown_letter_is_refused_with_the_known_ones(use: Callable[[ModelConfig], object]) -> None:
    config = small_config(num_layers=2, layer_pattern="LM")
    with pytest.raises(ConfigError, match=r"L \(lightning\) and S \(softmax\)") as caught:
        use(config)
    assert caught.value.option == "model.layer_pattern" and caught.value.fix


def test_a_letter_is_refused_even_where_no_layer_has_it() -> None:
    with pytest.raises(ConfigError, match="LMS"):
        meta_model(small_config(num_layers=1, layer_pattern="LMS"))


def test_planning_and_counting_load_no_torch() -> None:
    code = """
import sys
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.flops import count_parameters, step_flops
from mmtrain.parallel.layout import plan_layout
model = ModelConfig("m", 160, 64, 8, 8, 2, 8, 96)
plan_layout(2, ParallelConfig(tp=2), model, [32])
count_parameters(model), step_flops(model, [8])
sys.exit('torch' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

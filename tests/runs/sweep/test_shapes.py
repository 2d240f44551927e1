"""Shapes that a number of parameters is made into: exact counts, equal over architectures; what has none is refused."""

from __future__ import annotations

import pytest

from mmtrain.config import ModelConfig
from mmtrain.config.schema import Count
from mmtrain.config.sweep import SizeConfig, SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters
from mmtrain.runs.sweep.shapes import Shape, shape_of


def model(pattern: str = "S", experts: int = 0) -> ModelConfig:
    return ModelConfig(name="m", vocab_size=100, hidden_size=8, num_layers=8, num_heads=1, num_kv_heads=1, head_dim=8,
                       ffn_hidden_size=8, layer_pattern=pattern, num_experts=experts)  # fmt: skip


def derive(parameters: float, of: ModelConfig, head_dim: int = 64) -> Shape:
    sweep = SweepConfig(name="x", head_dim=head_dim)
    return shape_of(SizeConfig("size", parameters=Count(parameters)), sweep, of, "sweep.sizes[0]")


@pytest.mark.parametrize("parameters", [2e6, 5e6, 20e6, 70e6, 410e6, 1e9, 7e9])
@pytest.mark.parametrize("of", [model("S"), model("L"), model("LLLLLLLS"), model("LLLLLLLS", experts=16)], ids=str)
def test_a_number_of_parameters_is_met(parameters: float, of: ModelConfig) -> None:
    shape = derive(parameters, of)
    found = count_parameters(shape.applied(of)).activated_without_embeddings
    assert abs(found / parameters - 1) < 0.01
    assert shape.num_layers % 8 == 0 and shape.hidden_size == 64 * shape.num_heads


def test_architectures_differ_in_the_feed_forward_alone() -> None:
    shapes = [vars(derive(70e6, model(pattern))) for pattern in ("S", "L", "LLLLLLLS")]
    widths = {shape.pop("ffn_hidden_size") for shape in shapes}
    assert len(widths) == 3 and shapes[0] == shapes[1] == shapes[2]


def test_the_paper_s_count_is_met_by_its_own_feed_forward() -> None:
    """12 l d^2 of Table 1: with d and l of the rule, three matrices of 8/3 d beside four of d^2."""
    shape = derive(410e6, model("S"), head_dim=128)
    assert shape.ffn_hidden_size / shape.hidden_size == pytest.approx(8 / 3, rel=0.15)


def test_a_given_feed_forward_is_shared_out_over_the_experts_of_a_token() -> None:
    size = SizeConfig("a", layers=8, hidden=128, ffn=512)
    assert shape_of(size, SweepConfig(name="x"), model(), "s").ffn_hidden_size == 512
    assert shape_of(size, SweepConfig(name="x"), model(experts=8), "s").ffn_hidden_size == 256


def test_what_has_no_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s=10000: the nearest shape \(8 layers of 64\) has .* activated"):
        shape_of(SizeConfig("a", parameters=Count(10_000)), SweepConfig(name="x"), model(), "s")
    with pytest.raises(ConfigError, match=r"hidden=32 is narrower than a head of 64"):
        shape_of(SizeConfig("a", layers=8, hidden=32, ffn=64), SweepConfig(name="x"), model(), "s")

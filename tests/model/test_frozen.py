"""Patterns of frozen parameters: what they name, and what they are refused for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.build import build_model, meta_model
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.frozen import check_frozen, count_trained, freeze, is_frozen, learns
from mmtrain.model.model import LossOutput
from mmtrain.model.packed_seq import Packing

MODEL = ModelConfig("small", vocab_size=64, hidden_size=32, num_layers=12, num_heads=2, num_kv_heads=1, head_dim=16,
                    ffn_hidden_size=48, layer_pattern="LLLS", rotary_dim=8, num_experts=4)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "patterns", "frozen"),
    [
        ("layers.3.mixer.out_proj.weight", ["layers.*.mixer"], True),
        ("layers.3.mixer.out_proj.weight", ["layers.3"], True),
        ("layers.13.mixer.out_proj.weight", ["layers.3"], False),  # a part's name is whole
        ("layers.3.mixer.out_proj.weight", ["layers.*.mixer.norm"], False),
        ("layers.3.mixer.out_proj.weight", ["*.weight"], False),  # a wildcard is of one part
        ("layers.3.mixer.out_proj.weight", ["layers.3.mixer.out_proj.weight"], True),
        ("layers.3.mixer.out_proj.weight", ["layers.3.mixer.out_proj.weight.x"], False),
        ("layers.10.ffn.w2_DF", ["layers.1[01].ffn"], True),
        ("layers.10.ffn.w2_DF", ["layers.?"], False),
        ("norm.weight", ["*", "!norm"], False),
        ("norm.weight", ["!norm", "*"], True),  # the last that fits counts
        ("norm.weight", ["*", "!norm", "norm.weight"], True),
        ("lm_head.weight", ["*", "!norm"], True),
        ("norm.weight", [], False),
    ],
)
def test_what_a_pattern_names(name: str, patterns: list[str], frozen: bool) -> None:
    assert is_frozen(name, patterns) is frozen


def refusal(*patterns: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_frozen("optim.frozen", patterns, meta_model(MODEL))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("embed_token", "embed_tokens"),
        ("layers.*.mixers", "layers.*.mixer"),
        ("!layers.*.fnn.router", "layers.*.ffn.router"),
        ("layers.12.mixer", "layers.*.mixer"),
        ("layer.12", "layers.*"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_what_was_meant(pattern: str, meant: str) -> None:
    error = refusal("norm", pattern)
    assert (error.option, error.value) == ("optim.frozen[1]", pattern) and error.fix == f"did you mean '{meant}'?"


def test_a_pattern_like_nothing_is_told_the_parts() -> None:
    assert refusal("vision_tower").fix == "parts: embed_tokens, layers, norm, lm_head"
    assert "parts: " in refusal("").fix


def test_something_must_be_left_to_train() -> None:
    assert (
        refusal("*").problem
        == refusal("embed_tokens", "layers", "norm", "lm_head").problem
        == ("leaves nothing to train")
    )
    check_frozen("optim.frozen", ["*", "!norm"], meta_model(MODEL))


def test_trained_elements_are_counted() -> None:
    trained, total = count_trained(meta_model(MODEL), ["*", "!norm", "!lm_head"])
    sizes = {name: parameter.numel() for name, parameter in meta_model(MODEL).named_parameters()}
    assert total == sum(sizes.values()) and trained == 32 + 64 * 32


def test_backward_is_not_run_through_frozen_layers_at_the_bottom() -> None:
    """Nor is anything kept for it, with recomputation either."""
    model = build_model(replace(MODEL, num_layers=3, layer_pattern="LSL"))
    freeze(model, ["embed_tokens", "layers.[01]", "lm_head"])
    assert [learns(layer) for layer in model.layers] == [False, False, True] and not learns(model.lm_head)
    seen: dict[int, bool] = {}
    for number, layer in enumerate(model.layers):
        layer.recompute = True
        layer.register_forward_hook(lambda _, __, out, n=number: seen.update({n: out[0].requires_grad}))
    tokens = torch.arange(24) % 64
    out = model(tokens, Packing.from_lengths([10, 14]), tokens.roll(-1))
    assert isinstance(out, LossOutput)
    (out.ce_sum + out.aux_loss).backward()
    assert seen == {0: False, 1: False, 2: True}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (name.startswith("layers.2.") or name == "norm.weight"), name


@pytest.mark.parametrize(
    ("frozen", "runs"), [((), [2, 2]), (("embed_tokens",), [2, 2]), (("embed_tokens", "layers.0"), [1, 2])]
)
def test_layers_are_computed_again_where_backward_comes(frozen: tuple[str, ...], runs: list[int]) -> None:
    """The lowest that is trained too, whose input wants no gradient."""
    model = build_model(replace(MODEL, num_layers=2, layer_pattern="LS"))
    freeze(model, frozen)
    seen = [0, 0]
    for number, layer in enumerate(model.layers):
        layer.recompute = True
        layer.mixer.register_forward_pre_hook(lambda _, __, n=number: seen.__setitem__(n, seen[n] + 1))
    tokens = torch.arange(24) % 64
    model(tokens, Packing.from_lengths([10, 14]), tokens.roll(-1)).ce_sum.backward()
    assert seen == runs

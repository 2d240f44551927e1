"""The vision transformer against transformers' CLIP with the same weights: hidden states, and gradients of all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.layers import quick_gelu
from mmtrain.vision.vit import VisionTransformer
from tests.model.small import draw, relative
from tests.vision.small import TOWER, clip_of, encoder_gradients, small_vl_model

SIZES = {
    "small": {},
    "one patch, one head, one layer": dict(tile_size=7, num_heads=1, num_layers=1),
    "quick_gelu, another epsilon": dict(activation="quick_gelu", norm_eps=1e-2),
    "the last layer is not used": dict(unused_layers=1),
    "only the first layer is used": dict(unused_layers=2),
}


def both(
    encoder: ImageEncoder, tiles: int, unused: int = 0, attention: str = "sdpa"
) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """Hidden states of random tiles, ours and CLIP's, each after a backward pass of the same gradient."""
    config, dtype = encoder.config, encoder.newline_D.dtype
    pixels = draw(tiles, 3, config.tile_size, config.tile_size, dtype=dtype)
    clip = clip_of(encoder, attention)
    ours = encoder.vision_tower(pixels)
    theirs = clip(pixels, output_hidden_states=True).hidden_states[-1 - unused]
    weight = draw(*ours.shape, seed=1, dtype=dtype)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    return ours, theirs, clip


@pytest.mark.parametrize("size", SIZES)
def test_hidden_states_and_gradients_are_clip_s(size: str) -> None:
    encoder = small_vl_model(SIZES[size]).encoder
    unused = encoder.config.unused_layers
    ours, theirs, clip = both(encoder, tiles=5, unused=unused)
    assert relative(ours, theirs) < 1e-12
    grads = {name.removeprefix(TOWER): grad for name, grad in encoder_gradients(encoder).items()}
    compared = 0
    for name, parameter in clip.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.norm().clamp(min=1e-3)  # keys' biases change nothing: their gradient is 0
            assert (grads[name] - parameter.grad).norm() / scale < 1e-8, name
            compared += 1
    assert compared == 5 + 16 * (encoder.config.num_layers - unused)


def test_tiles_of_577_tokens_are_clip_s_in_fp32() -> None:
    vision = dict(tile_size=336, patch_size=14, hidden_size=64, num_layers=2, ffn_hidden_size=128)
    encoder = small_vl_model(vision).encoder.float()
    ours, theirs, _ = both(encoder, tiles=2, attention="eager")
    assert ours.shape == (2, 577, 64) and relative(ours, theirs) < 1e-5


def test_tiles_know_nothing_of_each_other() -> None:
    tower = small_vl_model().encoder.vision_tower
    pixels = draw(4, 3, 28, 28)
    assert torch.allclose(tower(pixels)[2], tower(pixels[2:3])[0], rtol=1e-12, atol=1e-12)


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        tower = small_vl_model().encoder.vision_tower
        for layer in tower.layers:
            layer.recompute = recompute
        tower(draw(2, 3, 28, 28)).square().sum().backward()
        found.append([parameter.grad for parameter in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_unused_layers_have_weights_and_get_no_gradient() -> None:
    tower = small_vl_model(dict(unused_layers=1)).encoder.vision_tower
    tower(draw(2, 3, 28, 28)).sum().backward()
    assert [layer.fc1.weight.grad is None for layer in tower.layers] == [False, False, True]


def test_quick_gelu_is_clip_s() -> None:
    from transformers.activations import ACT2FN

    x = draw(100)
    assert torch.allclose(quick_gelu(x), ACT2FN["quick_gelu"](x))


def test_initial_weights_keep_the_variance_of_the_residual() -> None:
    """After any depth the hidden states' variance is of the order of 1, as outputs of a layer begin at 1/sqrt(2L)."""
    for layers in (2, 12):
        from mmtrain.build import build_model
        from tests.vision.small import small_vl_config

        shape = dict(num_layers=layers, hidden_size=64, ffn_hidden_size=256)
        tower: VisionTransformer = build_model(small_vl_config(shape)).encoder.vision_tower
        deviation = tower(draw(4, 3, 28, 28, dtype=torch.float32)).std().item()
        assert 0.9 < deviation < 2, (layers, deviation)
        expected = 1 / math.sqrt(2 * layers) * math.sqrt(6 / (64 + 256))
        assert 0.98 * expected < tower.layers[0].fc2.weight.abs().max() <= expected * (1 + 1e-6)

"""The decay slopes, and the lightning mixer against a literal loop over tokens in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmtrain.model.mixers.lightning import LightningAttention, decay_slopes
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import rope_table
from tests.model.small import draw, relative, small_config, small_model


def released_slopes(heads: int) -> list[float]:
    """start^h with start = 2^(-2^(-(log2 H - 3))), as the released code writes it for powers of two."""
    start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
    return [start ** (h + 1) for h in range(heads)]


def alibi_slopes(heads: int) -> list[float]:
    """The first heads as for the power of two below; the others lie half-way between those, from the steepest."""
    below = 1 << (heads.bit_length() - 1)
    between = [2 ** (-8 * (h - 0.5) / below) for h in range(1, heads - below + 1)]
    return released_slopes(below) + between


@pytest.mark.parametrize("heads", [1, 2, 8, 64])
def test_slopes_of_powers_of_two(heads: int) -> None:
    assert decay_slopes(heads, 0, 80) == pytest.approx([s * 1.00001 for s in released_slopes(heads)], rel=1e-12)


@pytest.mark.parametrize("heads", [3, 6, 12, 24, 40])
def test_slopes_of_other_head_counts_interpolate_as_alibi(heads: int) -> None:
    assert decay_slopes(heads, 0, 80) == pytest.approx([s * 1.00001 for s in alibi_slopes(heads)], rel=1e-12)


def test_slopes_of_six_heads_by_hand() -> None:
    exponents = [-2, -4, -6, -8, -1, -3]
    assert decay_slopes(6, 0, 2) == pytest.approx([2.0**e * 1.00001 for e in exponents], rel=1e-12)


def test_slopes_of_the_released_model() -> None:
    first = decay_slopes(64, 0, 80)
    assert first[0] == pytest.approx(0.917004 * 1.00001, rel=1e-6)
    assert first[63] == pytest.approx(0.00390625 * 1.00001, rel=1e-12)
    factors = [decay_slopes(64, layer, 80)[63] / 0.00390625 for layer in range(80)]
    assert factors[78] == pytest.approx(0.012668, abs=5e-7)
    assert factors[79] == pytest.approx(1e-5, rel=1e-9)
    assert factors == pytest.approx([1 - layer / 79 + 1e-5 for layer in range(80)], rel=1e-12)


def test_a_model_of_one_layer_has_slopes() -> None:
    assert decay_slopes(4, 0, 1) == pytest.approx([s * 1.00001 for s in released_slopes(4)], rel=1e-12)


def test_layers_count_softmax_layers_too() -> None:
    model = small_model(num_layers=6, layer_pattern="LS")
    slopes = {layer: model.layers[layer].mixer.slopes_on(torch.device("cpu")) for layer in (0, 2, 4)}
    for layer, slopes_H in slopes.items():
        assert torch.equal(slopes_H, torch.tensor(decay_slopes(4, layer, 6)))
    assert not torch.equal(slopes[0], slopes[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_slopes_stay_fp32_when_the_layer_is_cast(dtype: torch.dtype) -> None:
    layer = small_model(num_layers=2, layer_pattern="L").to(dtype).layers[0].mixer
    assert torch.equal(layer.slopes_on(torch.device("cpu")), torch.tensor(decay_slopes(4, 0, 2)))
    assert not [name for name, _ in layer.named_buffers()]


def literal_mixer(layer: LightningAttention, x_TD: Tensor, lengths: list[int], slopes: list[float]) -> Tensor:
    """One token, head and earlier token at a time; rows of W_qkv are q, k and v of head 0, then of head 1, ..."""
    width, rows = layer.head_dim, layer.qkv_proj.weight

    def silu(y: Tensor) -> Tensor:
        return y / (1 + torch.exp(-y))

    out = []
    for start, stop in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        for t in range(start, stop):
            heads = []
            for head, slope in enumerate(slopes):
                w_q, w_k, w_v = (rows[(3 * head + part) * width : (3 * head + part + 1) * width] for part in range(3))
                q, o = silu(w_q @ x_TD[t]), torch.zeros(width, dtype=x_TD.dtype)
                for j in range(start, t + 1):
                    k, v = silu(w_k @ x_TD[j]), silu(w_v @ x_TD[j])
                    o = o + math.exp(-slope * (t - j)) * (q @ k) * v
                heads.append(o)
            o = torch.cat(heads)
            normed = layer.norm.weight * o / torch.sqrt((o * o).mean() + 1e-6)
            out.append(layer.out_proj.weight @ (normed / (1 + torch.exp(-layer.output_gate.weight @ x_TD[t]))))
    return torch.stack(out)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # small outputs show the epsilon of the norm
@pytest.mark.parametrize("lengths", [[13], [5, 1, 7]])
@pytest.mark.parametrize("head_groups", [1, 3])
def test_equals_a_literal_loop(head_groups: int, lengths: list[int], scale: float) -> None:
    config = small_config(hidden_size=16, num_heads=3, num_kv_heads=1, head_dim=4, rotary_dim=4, num_layers=4)
    layer = LightningAttention(config, layer=1).double()
    layer.head_groups = head_groups
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) * 0.5)
    x, upstream = (draw(13, 16, seed=10) * scale).requires_grad_(), draw(13, 16, seed=11)
    slopes = layer.slopes_on(x.device).tolist()
    inputs = [x, *layer.parameters()]

    packing = Packing.from_lengths(lengths)
    ours = layer(x, packing, rope_table(packing.position_ids_T, 4, 1e4))
    ours_grads = torch.autograd.grad((ours * upstream).sum(), inputs)
    theirs = literal_mixer(layer, x, lengths, slopes)
    theirs_grads = torch.autograd.grad((theirs * upstream).sum(), inputs)

    assert slopes == pytest.approx(decay_slopes(3, 1, 4), rel=1e-6)
    assert relative(ours, theirs) < 1e-11
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, mine, expected in zip(names, ours_grads, theirs_grads, strict=True):
        assert relative(mine, expected) < 1e-10, name

"""The softmax mixer against a literal einsum with a mask, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmtrain.model.mixers.softmax import SoftmaxAttention
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw, relative, small_config


def literal_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, allowed: Tensor) -> Tensor:
    """Query head h reads key/value head h // (H / G); `allowed` [queries, keys] is the mask."""
    group = [h // (q_THK.shape[1] // k_TGK.shape[1]) for h in range(q_THK.shape[1])]
    k, v = k_TGK[:, group], v_TGK[:, group]
    weight = torch.exp(torch.einsum("ihk,jhk->hij", q_THK, k) / math.sqrt(q_THK.shape[-1])) * allowed
    return torch.einsum("hij,jhk->ihk", weight / weight.sum(-1, keepdim=True), v)


def turn(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Pair i is (x_i, x_(i + R/2)), turned by its angle."""
    half = cos_TR.shape[1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b = x_THK[..., :half], x_THK[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x_THK[..., 2 * half :]], dim=-1)


def same_document(lengths: list[int]) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner).tril()


@pytest.mark.parametrize("lengths", [[23], [1, 9, 2, 1, 10]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_layer_equals_masked_einsum(heads: int, kv_heads: int, lengths: list[int]) -> None:
    config = small_config(hidden_size=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=8, rotary_dim=4)
    layer = SoftmaxAttention(config, layer=0).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    x, upstream = draw(23, 16, seed=10).requires_grad_(), draw(23, 16, seed=11)
    packing = Packing.from_lengths(lengths)
    angle = packing.position_ids_T[:, None] * 100.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
    table = angle.cos().float(), angle.sin().float()  # tables are fp32, whatever they turn
    inputs = [x, *layer.parameters()]

    ours = layer(x, packing, table)
    ours_grads = torch.autograd.grad((ours * upstream).sum(), inputs)
    q, k, v = ((x @ proj.weight.T).unflatten(-1, (-1, 8)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = literal_attention(turn(q, *table), turn(k, *table), v, same_document(lengths))
    theirs = o.flatten(1) @ layer.o_proj.weight.T
    theirs_grads = torch.autograd.grad((theirs * upstream).sum(), inputs)

    assert relative(ours, theirs) < 1e-12
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, mine, expected in zip(names, ours_grads, theirs_grads, strict=True):
        assert relative(mine, expected) < 1e-11, name

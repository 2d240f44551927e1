"""Logits and every gradient equal to transformers' MiniMax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmtrain.build import build_model
from mmtrain.model.packed_seq import Packing
from tests.model.hf_oracle import flat_like_hf, hf_model, hf_name
from tests.model.small import relative, small_config

SHAPES = {
    "hybrid": (dict(num_layers=8, layer_pattern="LLLLLLLS"), 300),
    "wide_heads_many_experts": (
        dict(num_layers=4, layer_pattern="LLLS", num_heads=2, num_kv_heads=1, head_dim=32, rotary_dim=32, num_experts=8,
             top_k=3),
        257,
    ),
    "softmax_only": (dict(num_layers=2, layer_pattern="S", num_kv_heads=4), 64),
    "lightning_only": (dict(num_layers=3, layer_pattern="L", num_experts=3), 513),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_equal_transformers(shape: str) -> None:
    changes, length = SHAPES[shape]
    model = build_model(small_config(**changes))
    oracle = hf_model(model)
    tokens = torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1)
    packing = Packing.from_lengths([length])

    theirs = oracle(input_ids=tokens[None]).logits[0]
    assert relative(model(tokens, packing), theirs) < 1e-5

    out = model(tokens, packing, labels)
    loss = F.cross_entropy(theirs, labels, reduction="sum")
    torch.testing.assert_close(out.ce_sum, loss, rtol=1e-5, atol=0)
    (out.ce_sum / length).backward()
    (loss / length).backward()
    gradients = {name: p.grad for name, p in oracle.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = gradients.pop(hf_name(name))
        assert relative(flat_like_hf(name, parameter.grad), expected) < 1e-5, name

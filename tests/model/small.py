"""A small configuration, its model and inputs, and how far two tensors are apart: shared by the model tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.build import build_model
from mmtrain.config import ModelConfig


def small_config(**changes: object) -> ModelConfig:
    """A dropless hybrid of 8 layers with 4 experts, with these options changed."""
    base = dict(name="small", vocab_size=160, hidden_size=48, num_layers=8, num_heads=4, num_kv_heads=2,
                head_dim=16, ffn_hidden_size=40, rotary_dim=16, num_experts=4, capacity_factor=None,
                loss_chunk_tokens=100)  # fmt: skip
    config = ModelConfig(**(base | changes))
    config.validate()
    return config


def small_model(seed: int = 1234, **changes: object) -> nn.Module:
    """A model of :func:`small_config` whose norm weights are not all 1, so that losing one shows."""
    model = build_model(small_config(**changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_tokens(count: int, seed: int = 0, vocab: int = 160) -> Tensor:
    """Token ids that depend on the seed alone."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that are there."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of what is expected (over 1e-30 where that is zero)."""
    return ((ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-30)).item()

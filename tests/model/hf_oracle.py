"""`transformers`' MiniMaxForCausalLM with the weights of one of our models, as a numerical oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.registry import SOFTMAX

# Our parameter names and theirs; layers.N. is common.
_NAMES = {
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "mixer.": "self_attn.",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.experts.w13_E2FD": "mlp.experts.gate_up_proj",
    "ffn.experts.w2_EDF": "mlp.experts.down_proj",
}


def hf_name(name: str) -> str:
    """The oracle's name of one of our parameters."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> MiniMaxForCausalLM:
    """The oracle with this model's shapes and weights; its RoPE turns every dimension of a head."""
    c: ModelConfig = model.config
    assert c.rotary_dim == c.head_dim, "the oracle ignores rotary_dim"
    theirs = MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, num_local_experts=c.num_experts, num_experts_per_tok=c.top_k,
            layer_types=["full_attention" if k == SOFTMAX.letter else "linear_attention" for k in c.layer_types],
            block_size=256, rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            full_attn_alpha_factor=c.alpha, full_attn_beta_factor=1.0, linear_attn_alpha_factor=c.alpha,
            linear_attn_beta_factor=1.0, mlp_alpha_factor=c.alpha, mlp_beta_factor=1.0, output_router_logits=False,
            attn_implementation="eager", use_cache=False,
        )
    ).to(dtype)  # fmt: skip
    target = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            target.pop(hf_name(name)).copy_(flat_like_hf(name, parameter))
    assert not target, f"weights that were not copied: {sorted(target)}"
    if c.layer_types[-1] != SOFTMAX.letter:
        _use_released_slopes(theirs.model.layers[-1].self_attn, c)
    return theirs


def _use_released_slopes(attention: nn.Module, c: ModelConfig) -> None:
    """The port writes the layer factor as 1 - l/(L-1+1e-5) + 1e-5. Only at l = L-1, which the released model never
    gives to a lightning layer, does that differ visibly from the released code: 1.5e-5 against 1e-5 for L = 3."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, c.num_heads + 1) / c.num_heads) * 1e-5
    slopes = slopes[:, None, None].to(attention.slope_rate.dtype)
    for name, value in zip(
        ("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
        (slopes, *attention.decay_factors(slopes)),
        strict=True,
    ):
        getattr(attention, name).copy_(value)


def flat_like_hf(name: str, tensor: Tensor) -> Tensor:
    """w13 [E, 2, F, D] as [E, 2F, D]; everything else as it is."""
    return tensor.flatten(1, 2) if name.endswith("w13_E2FD") else tensor

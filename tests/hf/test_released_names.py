"""Names and shapes of the released 456B model, against what is known of its files and against transformers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from mmtrain.config import ModelConfig
from mmtrain.config.schema import build
from mmtrain.hf.export import exported_bytes
from mmtrain.hf.hf_config import config_json, read_config
from mmtrain.hf.naming import file_shapes, is_derived
from mmtrain.hf.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 456_089_655_296  # parameters
# The released config.json.
RELEASED = {
    "architectures": ["MiniMaxText01ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": ([0] * 7 + [1]) * 10,
    "bos_token_id": None, "eos_token_id": None, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144,
    "initializer_range": 0.02, "intermediate_size": 9216, "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000, "model_type": "minimax_text_01", "num_attention_heads": 64,
    "num_experts_per_tok": 2, "num_hidden_layers": 80, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "postnorm": True, "rms_norm_eps": 1e-05, "rope_theta": 10000000, "rotary_dim": 64,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False, "use_cache": True,
    "vocab_size": 200064,
}  # fmt: skip


def released(**changes: object) -> ModelConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        values = compose("model/minimax_text_01").model
    return build(ModelConfig, {**values, **changes}, "model")


def original() -> dict[str, tuple[int, ...]]:
    """What the released files hold, written out."""
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (200064, 6144), "model.norm.weight": (6144,), "lm_head.weight": (200064, 6144),
    }  # fmt: skip
    for n in range(80):
        layer = f"model.layers.{n}"
        named |= {f"{layer}.{norm}.weight": (6144,) for norm in ("input_layernorm", "post_attention_layernorm")}
        lightning = {"qkv_proj": (24576, 6144), "output_gate": (8192, 6144), "out_proj": (6144, 8192), "norm": (8192,)}
        softmax = {"q_proj": (8192, 6144), "k_proj": (1024, 6144), "v_proj": (1024, 6144), "o_proj": (6144, 8192)}
        attention = softmax if n % 8 == 7 else lightning
        named |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        named[f"{layer}.block_sparse_moe.gate.weight"] = (32, 6144)
        for e in range(32):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            named |= {f"{expert}.w1.weight": (9216, 6144), f"{expert}.w3.weight": (9216, 6144)}
            named[f"{expert}.w2.weight"] = (6144, 9216)
    return named


def test_names_of_the_release_are_ours() -> None:
    named = file_shapes(released(), stacked=False)
    assert named == original()
    assert sum(math.prod(shape) for shape in named.values()) == TOTAL


def test_stacked_names_of_the_release_are_ours() -> None:
    named = {name: shape for name, shape in original().items() if ".block_sparse_moe." not in name}
    for n in range(80):
        moe = f"model.layers.{n}.mlp"
        named |= {f"{moe}.gate.weight": (32, 6144), f"{moe}.experts.gate_up_proj": (32, 18432, 6144)}
        named[f"{moe}.experts.down_proj"] = (32, 6144, 9216)
    assert file_shapes(released(), stacked=True) == named


def test_stacked_names_are_the_parameters_of_transformers() -> None:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    model = released(num_layers=8)
    values = config_json(model, port=True, dtype=torch.bfloat16, eos=200020, longest=None, reordered=True)
    with torch.device("meta"):
        theirs = MiniMaxForCausalLM(MiniMaxConfig(**values))
    named = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert file_shapes(model, stacked=True) == named


def test_the_released_config_is_read_and_written() -> None:
    told = read_config(RELEASED)
    ours = released(rope_base=1e7)
    assert told.model.alpha == ours.alpha and told.model.layer_types == ours.layer_types
    assert (told.model.rotary_dim, told.model.rope_base, told.reordered) == (64, 1e7, False)
    written = config_json(ours, port=False, dtype=torch.bfloat16, eos=None, longest=None, reordered=False)
    assert {name: written[name] for name in RELEASED} == RELEASED
    assert read_config(written) == told


def test_an_export_s_size_is_known_before_it_is_made() -> None:
    assert exported_bytes(released(), TARGETS["minimax"], torch.bfloat16) == 2 * TOTAL


def test_buffers_of_the_port_are_no_weights() -> None:
    for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        assert is_derived(f"model.layers.3.self_attn.{name}")
    assert not any(map(is_derived, original()))

"""The config.json of a Hugging Face folder: written from a model of ours, and read back into one.

Names and values of the released MiniMax-Text-01, and those of transformers' MiniMaxConfig for the same things.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.checkpoint.safetensors_file import BadFile
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.rope_rows import rope_parameters
from mmtrain.model.mixers.registry import SOFTMAX

RELEASED, PORT = "minimax_text_01", "minimax"  # model types
OWN = "mmtrain"
"""Entry of config.json for what neither format has a word for; other programs keep it and do not read it."""
RELEASED_EPS = 1e-6
"""Epsilon of the norm within lightning attention in the released code; a config.json does not say it."""
_LONGEST = 10_240_000  # max_position_embeddings of the release
_FULL, _LINEAR = "full_attention", "linear_attention"
_MOST = {
    "num_hidden_layers": 1 << 12, "num_local_experts": 1 << 12, "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14, "head_dim": 1 << 14, "rotary_dim": 1 << 14,
}  # fmt: skip
"""Most of what lists are made of before shapes are compared with those of the files."""


@dataclass(frozen=True)
class FolderModel:
    """What a config.json says.

    Attributes:
        model: the same architecture as a model of ours.
        reordered: rows of W_q and W_k are in the order of `mmtrain.hf.rope_rows`.
    """

    model: ModelConfig
    reordered: bool


def config_json(
    model: ModelConfig,
    port: bool,
    dtype: torch.dtype,
    eos: int | list[int] | None,
    longest: int | None,
    reordered: bool,
) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        model: with the RoPE base that its weights were trained with.
        port: as transformers' MiniMaxForCausalLM has it; else as MiniMax-Text-01 was released.
        dtype: of the files.
        eos: ids that end a text; None: not known.
        longest: tokens of the longest rows it was trained with; None: as released.
        reordered: rows of W_q and W_k are reordered so that rotating whole heads is our partial RoPE.
    """
    kind = [letter == SOFTMAX.letter for letter in model.layer_types]
    longest = longest or _LONGEST
    name = str(dtype).removeprefix("torch.")
    both = {
        "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None,
        "head_dim": model.head_dim, "hidden_act": "silu", "hidden_size": model.hidden_size, "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size, "max_position_embeddings": longest,
        "num_attention_heads": model.num_heads, "num_experts_per_tok": model.top_k if model.num_experts else 1,
        "num_hidden_layers": model.num_layers, "num_key_value_heads": model.num_kv_heads,
        "num_local_experts": max(1, model.num_experts), "output_router_logits": False, "rms_norm_eps": model.norm_eps,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "sliding_window": None,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": model.vocab_size,
        OWN: {"dense": not model.num_experts, "rotary_dim": model.rotary_dim, "reordered": reordered},
    }  # fmt: skip
    if not port:
        return both | {
            "architectures": ["MiniMaxText01ForCausalLM"], "model_type": RELEASED, "torch_dtype": name,
            "attn_type_list": [int(full) for full in kind], "layernorm_full_attention_alpha": model.alpha,
            "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_alpha": model.alpha,
            "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": model.alpha, "layernorm_mlp_beta": 1.0,
            "postnorm": model.post_norm, "rope_theta": model.rope_base, "rotary_dim": model.rotary_dim,
            "shared_intermediate_size": model.shared_ffn_hidden_size if model.num_experts else 0,
            "shared_moe_mode": "sigmoid",
        }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if reordered:
        rope = rope_parameters(model.head_dim, model.rotary_dim, model.rope_base, longest)
    elif model.rotary_dim != model.head_dim:
        rope["partial_rotary_factor"] = model.rotary_dim / model.head_dim
    return both | {
        "architectures": ["MiniMaxForCausalLM"], "model_type": PORT, "dtype": name,
        "layer_types": [_FULL if full else _LINEAR for full in kind], "block_size": 256, "rope_parameters": rope,
        "full_attn_alpha_factor": model.alpha, "full_attn_beta_factor": 1.0, "linear_attn_alpha_factor": model.alpha,
        "linear_attn_beta_factor": 1.0, "mlp_alpha_factor": model.alpha, "mlp_beta_factor": 1.0,
    }  # fmt: skip


def read_config(config: dict[str, Any]) -> FolderModel:
    """Return the model that a config.json describes.

    Raises:
        BadFile: it is of another architecture, lacks something, holds a value that cannot be, or asks for what our
            model does not have.
    """
    kind = config.get("model_type")
    if kind not in (RELEASED, PORT):
        raise BadFile(f"is of the model type {str(kind)[:40]!r}; {RELEASED!r} and {PORT!r} are known")
    if "quantization_config" in config:
        raise BadFile("says that the weights are quantised: take the bfloat16 ones")
    _only(config, "hidden_act", "silu")
    _only(config, "tie_word_embeddings", False)
    _only(config, "sliding_window", None)
    own = config.get(OWN) if isinstance(config.get(OWN), dict) else {}
    port = kind == PORT
    head_dim = _count(
        config, "head_dim", _count(config, "hidden_size") // max(1, _count(config, "num_attention_heads"))
    )
    base, rotary_dim, reordered = _rope(config, own, port, head_dim)
    experts = _count(config, "num_local_experts")
    shared = 0 if port else _count(config, "shared_intermediate_size", 0)
    if shared:
        _only(config, "shared_moe_mode", "sigmoid")
    letters = _layers(config, port)
    made = ModelConfig(
        name="imported", vocab_size=_count(config, "vocab_size"), hidden_size=_count(config, "hidden_size"),
        num_layers=_count(config, "num_hidden_layers"), num_heads=_count(config, "num_attention_heads"),
        num_kv_heads=_count(config, "num_key_value_heads"), head_dim=head_dim,
        ffn_hidden_size=_count(config, "intermediate_size"), layer_pattern=letters, rotary_dim=rotary_dim,
        rope_base=base, num_experts=0 if own.get("dense") is True and experts == 1 else experts,
        top_k=_count(config, "num_experts_per_tok"), shared_ffn_hidden_size=shared,
        post_norm=True if port else config.get("postnorm", False) is True, deepnorm_alpha=_alpha(config, port),
        norm_eps=_number(config, "rms_norm_eps"),
    )  # fmt: skip
    try:
        made.validate()
    except ConfigError as error:
        raise BadFile(f"describes a model that cannot be ({error})") from None
    return FolderModel(made, reordered)


def _rope(config: dict[str, Any], own: dict[str, Any], port: bool, head_dim: int) -> tuple[float, int, bool]:
    """Return base, rotated dimensions, and whether rows are reordered."""
    if not port:
        if config.get("rope_scaling") is not None:
            raise BadFile("scales RoPE (rope_scaling), which our model does not")
        return _number(config, "rope_theta"), _count(config, "rotary_dim", head_dim), False
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):  # as transformers 4 wrote it
        rope = {"rope_type": "default", "rope_theta": _number(config, "rope_theta")}
        if config.get("rope_scaling") is not None:
            raise BadFile("scales RoPE (rope_scaling), which our model does not")
    base = _number(rope, "rope_theta")
    if rope.get("rope_type", "default") == "default":
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if part == 1.0 and type(config.get("rotary_dim")) is int:  # which the port keeps of the release, unread
            return base, _count(config, "rotary_dim"), False
        if type(part) not in (int, float) or not 0 <= part <= 1:
            raise BadFile(f"has partial_rotary_factor={str(part)[:20]}")
        return base, round(head_dim * part), False
    rotary_dim = own.get("rotary_dim")
    if own.get("reordered") is not True or type(rotary_dim) is not int or not 0 <= rotary_dim <= head_dim:
        raise BadFile(f"has RoPE of the type {str(rope['rope_type'])[:20]!r}, which our model does not have")
    expected = rope_parameters(head_dim, rotary_dim, base, 1)["short_factor"]
    found = rope.get("short_factor")
    if not isinstance(found, list) or found != rope.get("long_factor") or not _close(found, expected):
        raise BadFile("says that its rows are reordered for partial RoPE, and has other frequencies than those")
    return base, rotary_dim, True


def _close(found: list[Any], expected: list[float]) -> bool:
    numbers = len(found) == len(expected) and all(type(value) in (int, float) for value in found)
    return numbers and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, expected, strict=True))


def _layers(config: dict[str, Any], port: bool) -> str:
    name, known = ("layer_types", {_LINEAR: "L", _FULL: "S"}) if port else ("attn_type_list", {0: "L", 1: "S"})
    value, count = config.get(name), _count(config, "num_hidden_layers")
    if not isinstance(value, list) or len(value) != count or any(not _known(kind, known) for kind in value):
        raise BadFile(f"has no {name} of {count} layers of {' and '.join(map(repr, known))}")
    return "".join(known[kind] for kind in value)


def _known(kind: Any, known: dict[Any, str]) -> bool:
    return type(kind) in (int, str) and kind in known


def _alpha(config: dict[str, Any], port: bool) -> float:
    """Return the one residual factor that our model has; the factors of the branches must be 1."""
    if port:
        alphas, betas = ([f"{part}_{kind}_factor" for part in ("full_attn", "linear_attn", "mlp")]
                         for kind in ("alpha", "beta"))  # fmt: skip
    else:
        alphas, betas = ([f"layernorm_{part}_{kind}" for part in ("full_attention", "linear_attention", "mlp")]
                         for kind in ("alpha", "beta"))  # fmt: skip
    for name in betas:
        if _number(config, name, 1.0) != 1.0:
            raise BadFile(f"has {name}={config[name]}; our model has no such factor, only 1")
    found = [_number(config, name, 1.0) for name in alphas]
    if len(set(found)) != 1:
        raise BadFile(f"has residual factors {found} ({', '.join(alphas)}); our model has one for all")
    return found[0]


def _only(config: dict[str, Any], name: str, value: Any) -> None:
    if config.get(name, value) != value:
        raise BadFile(f"has {name}={str(config[name])[:40]}; only {value} is known")


def _count(values: dict[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    value = default if value is None else value
    most = _MOST.get(name, 1 << 32)
    if type(value) is not int or not 0 <= value <= most:
        raise BadFile(f"has {name}={str(value)[:40]}, where a whole number of at most {most} belongs")
    return value


def _number(values: dict[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise BadFile(f"has {name}={str(value)[:40]}, where a positive number belongs")
    return float(value)

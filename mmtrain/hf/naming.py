"""Names and shapes that tensors have in the files of a Hugging Face folder, for every parameter of ours.

Two namings of experts are known. *Separate* ones are those of MiniMax-Text-01 as it was released, which transformers'
`save_pretrained` writes too and vLLM reads: a tensor for each matrix of each expert. *Stacked* ones are the names of
the parameters within transformers 5: one tensor a layer for gate and up of all experts, one for down. All other names
are the same in both.

Legend: D model width, F expert width, E experts, H heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.mixers.registry import LIGHTNING, SOFTMAX

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_COMMON = {
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
}
_SHARED = {"w13_2FD": ("gate_proj", "up_proj"), "w2_DF": ("down_proj",)}
_SEPARATE, _STACKED = "block_sparse_moe", "mlp"
_PORT_BUFFERS = re.compile(
    r"model\.(layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)|rotary_emb\.inv_freq"
    r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)"
)


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and the part of a parameter of ours that it holds.

    Attributes:
        name: of the tensor.
        shape: in the file.
        at: indices of the parameter's leading dimensions; the tensor holds all of the others, perhaps reshaped.
        is_rotated: its rows are those of queries or keys of softmax attention, which a file may hold in another order
            (`mmtrain.hf.rope_rows`).
    """

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...] = ()
    is_rotated: bool = False


def pieces_of(parameter: str, shape: Sequence[int], stacked: bool) -> list[Piece]:
    """Return the tensors that make up one of our parameters.

    Args:
        parameter: its name in :class:`~mmtrain.model.model.HybridLM`.
        shape: of the full parameter.
        stacked: which naming of experts.

    Raises:
        ConfigError: the format has no such parameter: it is of a mixer that the released model does not have.
    """
    found = _LAYER.fullmatch(parameter)
    if found is None:
        return [Piece(parameter if parameter.startswith("lm_head") else f"model.{parameter}", tuple(shape))]
    layer, rest = f"model.layers.{found[1]}", found[2]
    if rest in _COMMON:
        return [Piece(f"{layer}.{_COMMON[rest]}", tuple(shape))]
    room, _, leaf = rest.partition(".")
    if room == "mixer":
        return [Piece(f"{layer}.self_attn.{leaf}", tuple(shape), is_rotated=leaf in ("q_proj.weight", "k_proj.weight"))]
    if leaf == "router.weight":
        return [Piece(f"{layer}.{_moe(stacked)}.gate.weight", tuple(shape))]
    if leaf == "shared.coefficient.weight":
        return [Piece(f"{layer}.coefficient.weight", tuple(shape))]
    if leaf.startswith("shared.mlp."):
        names = _SHARED[leaf.removeprefix("shared.mlp.")]
        return list(_matrices([f"{layer}.shared_mlp.{name}.weight" for name in names], shape))
    return list(_experts(f"{layer}.{_moe(stacked)}.experts", leaf.removeprefix("experts."), tuple(shape), stacked))


def _moe(stacked: bool) -> str:
    return _STACKED if stacked else _SEPARATE


def _experts(prefix: str, leaf: str, shape: tuple[int, ...], stacked: bool) -> Iterator[Piece]:
    """Yield the tensors of routed experts (w13_E2FD, w2_EDF), or of a dense feed-forward, the only expert."""
    per_layer = shape if leaf in ("w13_E2FD", "w2_EDF") else (1, *shape)
    ours = len(shape) == len(per_layer)
    if stacked:
        if leaf.startswith("w13"):
            experts, _, ffn, width = per_layer
            yield Piece(f"{prefix}.gate_up_proj", (experts, 2 * ffn, width))
        else:
            yield Piece(f"{prefix}.down_proj", per_layer)
        return
    for expert in range(per_layer[0]):
        names = ("w1", "w3") if leaf.startswith("w13") else ("w2",)
        yield from _matrices([f"{prefix}.{expert}.{name}.weight" for name in names], per_layer[1:],
                             (expert,) if ours else ())  # fmt: skip


def _matrices(names: Sequence[str], shape: Sequence[int], at: tuple[int, ...] = ()) -> Iterator[Piece]:
    """Yield gate and up, stacked in a parameter [2, F, D], or the one matrix that a parameter is."""
    if len(names) == 1:
        yield Piece(names[0], tuple(shape), at)
        return
    for i, name in enumerate(names):
        yield Piece(name, tuple(shape[1:]), (*at, i))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model by its name, in order, without any memory for it.

    Raises:
        ConfigError: the format has no layers of a kind that the model has.
    """
    for letter in config.layer_types:
        if letter not in (LIGHTNING.letter, SOFTMAX.letter):
            raise ConfigError("model.layer_pattern", config.layer_pattern,
                              f"the format of MiniMax-Text-01 has no layers of the kind {letter}",
                              "only L and S can be exported and imported")  # fmt: skip
    text = meta_model(replace(config, vision=None))
    return {name: tuple(parameter.shape) for name, parameter in text.named_parameters()}


def file_shapes(config: ModelConfig, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a folder must hold of a model, by name."""
    every = parameter_shapes(config).items()
    named = {piece.name: piece.shape for name, shape in every for piece in pieces_of(name, shape, stacked)}
    return named | router_of_one(config, stacked)


def router_of_one(config: ModelConfig, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what a folder holds of a dense model besides its parameters: routers of one expert.

    Softmax over one logit is exactly 1, so what such a router weighs by does not matter, and it is written as zeros.
    """
    if config.num_experts:
        return {}
    names = (f"model.layers.{i}.{_moe(stacked)}.gate.weight" for i in range(config.num_layers))
    return dict.fromkeys(names, (1, config.hidden_size))


def is_stacked(names: Mapping[str, object]) -> bool:
    """Tell by the names of a folder's tensors whether its experts are stacked."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def is_derived(name: str) -> bool:
    """Tell whether a tensor holds no weights: decays and frequencies that follow from the configuration."""
    return _PORT_BUFFERS.fullmatch(name) is not None

"""Bytes of a model's weights on each of the GPUs that serve it, from the shapes of its parameters.

Tensor parallelism cuts mixers, dense feed-forwards, the embedding and the head over tp devices, experts are shared out
over ep of them and cut by their width over the tp / ep that are left. Routers, norms and eyes lie on every one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from mmkernels.int8_weights import scale_columns
from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.compute_dtype import INT8, compute_dtype
from mmtrain.infer.quantised.replace import quantised_kind
from mmtrain.model.mixers.registry import Placement, mixer_spec
from mmtrain.model.moe.router import Router

_DIMENSION = {Placement.ROWS: 0, Placement.COLUMNS: 1}
_SCALE_BYTES = _FP32_BYTES = 4


@dataclass(frozen=True)
class ServingLayout:
    """The GPUs that serve one copy of a model.

    Attributes:
        tp: their number, over which mixers are cut.
        ep: groups of them over which experts are shared out.
    """

    tp: int = 1
    ep: int = 1

    @property
    def etp(self) -> int:
        """Devices over which each expert's width is cut."""
        return self.tp // self.ep

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout under which a model cannot be cut evenly.

        Raises:
            ConfigError: the first reason.
        """
        for name, value in (("--tp", self.tp), ("--ep", self.ep)):
            if value < 1:
                raise ConfigError(name, value, "must be at least 1", "leave it out")
        for letter in sorted(set(config.layer_types)):
            if problem := mixer_spec(letter).tp_problem(config, self.tp):
                raise ConfigError("--tp", self.tp, problem, "give another number")
        if self.tp % self.ep:
            raise ConfigError("--ep", self.ep, f"must divide --tp {self.tp}", "give another number")
        if config.num_experts % self.ep or (self.ep > 1 and not config.num_experts):
            raise ConfigError("--ep", self.ep, f"must divide the {config.num_experts} experts", "give another number")
        for width, ways in ((config.ffn_hidden_size, self.etp if config.num_experts else self.tp),
                            (config.shared_ffn_hidden_size, self.tp)):  # fmt: skip
            if width % ways:
                raise ConfigError("--tp", self.tp, f"leaves {ways} devices a feed-forward's width of {width:,}",
                                  "give a number that divides it, or another --ep")  # fmt: skip


def weight_bytes_on(config: ModelConfig, layout: ServingLayout, precision: str, device: torch.device) -> dict[str, int]:
    """Return the bytes that each part of a model takes on a device, quantised after it was cut.

    Args:
        config: the architecture.
        layout: as :meth:`ServingLayout.check` passes it.
        precision: "fp32", "bf16", "int8" or "int8-g128".
        device: a kind of device; int8 has bf16 beside it on a GPU, fp32 on a CPU.
    """
    dtype, model = compute_dtype(precision, device), meta_model(config)
    parts: dict[str, int] = {}
    for path, module in model.named_modules():
        int8 = precision in INT8 and quantised_kind(path, module) is not None
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = local_shape(config, layout, f"{path}.{leaf}", tuple(parameter.shape))
            if int8:
                scales = math.prod(shape[:-1]) * scale_columns(shape[-1], INT8[precision])
                taken = math.prod(shape) + scales * _SCALE_BYTES
            else:
                taken = math.prod(shape) * (_FP32_BYTES if isinstance(module, Router) else dtype.itemsize)
            part = _part(model, path)
            parts[part] = parts.get(part, 0) + taken
    return parts


def local_shape(config: ModelConfig, layout: ServingLayout, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the largest part that a device has of a parameter, given its name and shape in the model."""
    for dim, ways in _cuts(config, layout, name):
        shape = (*shape[:dim], -(-shape[dim] // ways), *shape[dim + 1 :])
    return shape


def _cuts(config: ModelConfig, layout: ServingLayout, name: str) -> list[tuple[int, int]]:
    """Dimensions that are cut, and into how many parts."""
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return [(0, layout.tp)]
    _, _, inside = name.partition("layers.")
    number, _, leaf = inside.partition(".")
    if leaf.startswith("mixer."):
        placements = mixer_spec(config.layer_types[int(number)]).placements(config, layout.tp)
        placement = placements[leaf.removeprefix("mixer.")]
        return [(_DIMENSION[placement], layout.tp)] if placement in _DIMENSION else []
    if leaf.startswith("ffn.experts."):
        return [(0, layout.ep), (2, layout.etp)]
    if leaf.endswith((".w13_2FD", ".w2_DF")):
        return [(1, layout.tp)]
    return []


def _part(model: nn.Module, path: str) -> str:
    if path.split(".")[0] == "encoder":
        return "eyes"
    for part, names in (("embedding", ("embed_tokens",)), ("head", ("lm_head",)), ("experts", ("experts",)),
                        ("mixers", ("mixer",)), ("feed_forward", ("ffn", "mlp"))):  # fmt: skip
        if set(names) & set(path.split(".")) and not isinstance(model.get_submodule(path), Router):
            return part
    return "routers_and_norms"

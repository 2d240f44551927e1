"""Shapes of a sweep's models: as they are given, or derived from a number of parameters.

The rule for a number N of activated parameters without embeddings: layers l (a multiple of `layers_multiple`) and
width d (whole heads) are those for which 12 l d^2, the paper's count (MiniMax-01 Table 1), is nearest to N and d / l
nearest to `aspect`, the two errors as logarithms added up. They are the same for every architecture. The width of the
feed-forward, a multiple of 8, is then each architecture's own: the one with which its exact count
(`mmtrain.model.flops`) is nearest to N, so that architectures are compared at equal size. The rule is chosen here: the
paper gives sizes and no shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mmtrain.config import ModelConfig
from mmtrain.config.sweep import SizeConfig, SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters

MOST_LAYERS = 256
TOLERANCE = 0.05  # of the number of parameters; the least step of a feed-forward is 24 l d, far below it
FFN_STEP = 8
PARAMETERS_WEIGHT = 4.0  # a number that is missed by 10% counts as much as an aspect off by 46%


@dataclass(frozen=True)
class Shape:
    """Options of `model` that a size decides.

    Attributes:
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, ffn_hidden_size: as `ModelConfig` has them.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns: half of them, as in the release, and an even number."""
        return self.head_dim // 4 * 2

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return the model in this shape."""
        return replace(model, rotary_dim=self.rotary_dim, **vars(self))

    def overrides(self) -> list[str]:
        """Return the shape as overrides."""
        values = {**vars(self), "rotary_dim": self.rotary_dim}
        return [f"model.{name}={value}" for name, value in values.items()]


def shape_of(size: SizeConfig, sweep: SweepConfig, model: ModelConfig, option: str) -> Shape:
    """Return the shape of one size for one architecture.

    Args:
        size: what is asked for.
        sweep: for the rule's numbers.
        model: the architecture, whose own shape does not matter.
        option: name of the size in messages.

    Raises:
        ConfigError: no shape has so many parameters, or heads do not fit the width.
    """
    head_dim = size.head_dim or sweep.head_dim
    layers, hidden = size.layers, size.hidden
    if layers is None or hidden is None:
        assert size.parameters is not None  # SizeConfig.validate
        layers, hidden = derived(size.parameters, head_dim, sweep.aspect, sweep.layers_multiple)
    heads = size.heads or hidden // head_dim
    if heads < 1:
        raise ConfigError(option, size.name, f"hidden={hidden} is narrower than a head of {head_dim}",
                          "give heads, or a smaller head_dim")  # fmt: skip
    shape = Shape(layers, hidden, heads, size.kv_heads or heads, head_dim, FFN_STEP)
    share = model.top_k if model.num_experts else 1
    if size.ffn is not None:
        if size.ffn % share:
            raise ConfigError(option, size.ffn, f"ffn cannot be shared out over top_k={share} experts",
                              f"give a multiple of {share * FFN_STEP}")  # fmt: skip
        return replace(shape, ffn_hidden_size=size.ffn // share)
    assert size.parameters is not None  # SizeConfig.validate
    least, more = (_activated(replace(shape, ffn_hidden_size=width), model) for width in (FFN_STEP, 2 * FFN_STEP))
    steps = max(0, round((size.parameters - least) / (more - least)))
    shape = replace(shape, ffn_hidden_size=FFN_STEP * (1 + steps))
    found = _activated(shape, model)
    if abs(found / size.parameters - 1) > TOLERANCE:
        raise ConfigError(option, int(size.parameters),
                          f"the nearest shape ({layers} layers of {hidden}) has {found:,} activated parameters",
                          "give layers, hidden and ffn, a smaller sweep.layers_multiple or head_dim")  # fmt: skip
    return shape


def derived(parameters: int, head_dim: int, aspect: float, multiple: int) -> tuple[int, int]:
    """Return layers and width by the rule above."""

    def off(layers: int, hidden: int) -> float:
        count, ratio = 12 * layers * hidden**2 / parameters, hidden / layers / aspect
        return PARAMETERS_WEIGHT * abs(math.log(count)) + abs(math.log(ratio))

    choices = []
    for layers in range(multiple, MOST_LAYERS + 1, multiple):
        heads = max(1, int(math.sqrt(parameters / (12 * layers)) / head_dim))
        choices += [(layers, heads * head_dim), (layers, (heads + 1) * head_dim)]
    return min(choices, key=lambda choice: off(*choice))


def _activated(shape: Shape, model: ModelConfig) -> int:
    return count_parameters(shape.applied(model)).activated_without_embeddings

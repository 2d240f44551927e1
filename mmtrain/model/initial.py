"""The ways in which a parameter's elements begin: a module says in its attribute `initial` how its own do.

`initial` maps the name of each parameter that is the module's own to one of the classes here; `mmtrain.model.init`
fills the parameter by it. Random elements are a function of the seed and the parameter's full name, so renaming a
parameter, or an attribute on the way to it, changes the weights that a seed gives, and breaks checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """All elements begin at one value."""

    value: float


@dataclass(frozen=True)
class Uniform:
    """Elements begin uniform in (-a, a), whatever the parameter's shape.

    Attributes:
        deviation: standard deviation, a over the square root of 3.
    """

    deviation: float

    def bound(self, index: Tensor, shape: torch.Size) -> Tensor | float:
        """The bound a of each element, as :meth:`Xavier.bound` gives it."""
        return self.deviation * math.sqrt(3.0)


@dataclass(frozen=True)
class Xavier:
    """Elements begin uniform in (-a, a), a = gain sqrt(6 / (fan_in + fan_out)), of the last two dimensions.

    Attributes:
        gain: DeepNorm's beta for value, output and feed-forward matrices, 1 for all others.
    """

    gain: float = 1.0

    def bound(self, index: Tensor, shape: torch.Size) -> Tensor | float:
        """The bound a of each element.

        Args:
            index: int64, index of each element in the flattened full parameter.
            shape: of the full parameter.

        Returns:
            One number where it is the same for all elements, else fp32 of the shape of `index`.
        """
        return self.gain * xavier_bound(fan_in=shape[-1], fan_out=shape[-2])


XAVIER = Xavier()
"""The commonest beginning: gain 1."""


@dataclass(frozen=True)
class XavierQKV:
    """Three Xavier matrices, q, k and v, whose rows are interleaved by head: K of q, K of k, K of v.

    Attributes:
        head_dim: K.
        value_gain: gain of v; that of q and k is 1.
    """

    head_dim: int
    value_gain: float

    def bound(self, index: Tensor, shape: torch.Size) -> Tensor | float:
        """The bound of each element, as :meth:`Xavier.bound` gives it, with a third of the rows as fan_out."""
        row_in_head = index // shape[1] % (3 * self.head_dim)
        gain = torch.where(row_in_head >= 2 * self.head_dim, self.value_gain, 1.0)
        return gain * xavier_bound(fan_in=shape[-1], fan_out=shape[-2] // 3)


Initial = Constant | Uniform | Xavier | XavierQKV


def xavier_bound(fan_in: int, fan_out: int) -> float:
    """The bound of a Xavier-uniform matrix with gain 1 (Glorot and Bengio, 2010, eq. 16)."""
    return math.sqrt(6.0 / (fan_in + fan_out))

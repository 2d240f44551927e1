"""Projection with a bias, LayerNorm and activations: what CLIP's layers have and the text model's have not.

Legend: T rows, W input width, V output width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.gradient_sum import project
from mmtrain.model.initial import XAVIER, Constant, Initial
from mmtrain.model.weights import local


class Affine(nn.Module):
    """y = M x + b.

    Args:
        in_features: W.
        out_features: V.
        initial: how M [V, W] begins; b begins at 0.
    """

    def __init__(self, in_features: int, out_features: int, initial: Initial = XAVIER) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.initial: dict[str, Initial] = {"weight": initial, "bias": Constant(0.0)}

    def forward(self, x_TW: Tensor) -> Tensor:
        """Project every row; [T, W] to [T, V]."""
        return project(x_TW, local(self.weight), local(self.bias))

    def extra_repr(self) -> str:
        """Input and output width, for printing the module."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class LayerNorm(nn.Module):
    """y = weight (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.initial: dict[str, Initial] = {"weight": Constant(1.0), "bias": Constant(0.0)}
        self.eps = eps

    def forward(self, x_TW: Tensor) -> Tensor:
        """Normalise every row of x, of any float dtype, which the result has too."""
        weight_W = local(self.weight)
        return F.layer_norm(x_TW, weight_W.shape, weight_W, local(self.bias), self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon, for printing the module."""
        return f"{self.weight.numel()}, eps={self.eps}"


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x), which OpenAI's CLIP has for GELU (Hendrycks and Gimpel, 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
"""Activations by their names in the configuration; ``gelu`` is the exact one, by the error function."""

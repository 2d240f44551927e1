"""The projector: two layers that bring features of the vision transformer to the language model's width.

Legend: M patches, W width of the vision transformer, D of the language model.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmtrain.vision.layers import ACTIVATIONS, Affine


class Projector(nn.Module):
    """y = B activation(A x + a) + b, where A is [D, W] and B [D, D] (MiniMax-01 section 6; LLaVA-1.5's projector).

    Args:
        vision_width: W.
        hidden_size: D.
        activation: its name.
    """

    def __init__(self, vision_width: int, hidden_size: int, activation: str) -> None:
        super().__init__()
        self.linear_1 = Affine(vision_width, hidden_size)
        self.linear_2 = Affine(hidden_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_MW: Tensor) -> Tensor:
        """Project every patch; [M, W] to [M, D]."""
        return self.linear_2(self.activation(self.linear_1(x_MW)))

"""A projection without bias.

Legend: T tokens, D input width, E output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.model.gradient_sum import project
from mmtrain.model.initial import XAVIER, Initial
from mmtrain.model.weights import local


class Linear(nn.Module):
    """y = W x, where this process may hold a part of W's rows or columns.

    Args:
        in_features: D.
        out_features: E.
        initial: how W [E, D] begins.
    """

    def __init__(self, in_features: int, out_features: int, initial: Initial = XAVIER) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.initial: dict[str, Initial] = {"weight": initial}

    def forward(self, x_TD: Tensor, rows: slice | None = None) -> Tensor:
        """Project every token; [T, D] to [T, E].

        Args:
            x_TD: any float dtype, that of the weight.
            rows: rows of this process's part of W to project to; None: all of them.
        """
        weight_ED = local(self.weight)
        return project(x_TD, weight_ED if rows is None else weight_ED[rows])

    def extra_repr(self) -> str:
        """Input and output width, for printing the module."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"

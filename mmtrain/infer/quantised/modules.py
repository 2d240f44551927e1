"""Modules with int8 weights that take the place of the model's own, with the same forward.

For a parameter `p` of the module that it replaces, each holds the buffers `p_values` (int8, of its shape) and `p_scale`
(fp32). They are no parameters, so no cast of the model touches them and no optimizer finds them.

Legend: T tokens, D input width, E output width, and E experts where there are any; F inner width, R rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.int8_weights import Int8Weight, empty_int8, grouped_int8_mlp, int8_linear, quantise_into
from mmkernels.int8_weights import rows as some_rows
from mmkernels.moe import Route
from mmkernels.swiglu import swiglu
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.moe.experts import Experts
from mmtrain.model.weights import local


class QuantisedModule(nn.Module):
    """A module whose weights are int8.

    Args:
        source: the module that it replaces; the local part of each of its parameters gives the shape and device, and on
            a device with memory the values.
        grouped: a scale for every 128 columns of a weight, else one a row.
    """

    def __init__(self, source: nn.Module, grouped: bool) -> None:
        super().__init__()
        for name, parameter in source.named_parameters(recurse=False):
            weight = local(parameter).detach()
            made = empty_int8(tuple(weight.shape), grouped, weight.device)
            self.register_buffer(f"{name}_values", made.values)
            self.register_buffer(f"{name}_scale", made.scale)
            if not weight.is_meta:
                self.fill(name, weight)

    def fill(self, name: str, weight: Tensor) -> None:
        """Quantise a parameter of the replaced module into its buffers; it may lie on another device.

        Raises:
            KernelArgumentError: it is of another shape, or holds NaN or infinity.
        """
        quantise_into(self.held(name), weight)

    def held(self, name: str) -> Int8Weight:
        """Return what is held of a parameter of the replaced module."""
        return Int8Weight(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_scale"))


class QuantisedLinear(QuantisedModule):
    """:class:`~mmtrain.model.linear.Linear` in int8."""

    def forward(self, x_TD: Tensor, rows: slice | None = None) -> Tensor:
        """Project every token; [T, D] to [T, E].

        Args:
            x_TD: in the dtype of the activations.
            rows: rows of this process's part of W to project to; None: all of them.
        """
        weight_ED = self.held("weight")
        return int8_linear(x_TD, weight_ED if rows is None else some_rows(weight_ED, rows))


class QuantisedSwiGLU(QuantisedModule):
    """:class:`~mmtrain.model.ffn.SwiGLU` in int8.

    Attributes:
        sequence: brings the tokens of all ranks here, and sums partial results over ranks.
    """

    def __init__(self, source: SwiGLU, grouped: bool) -> None:
        super().__init__(source, grouped)
        self.sequence = source.sequence

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W2 (SiLU(W1 x) * W3 x) of every token; [T, D] to [T, D]."""
        w13_2FD = self.held("w13_2FD")
        w13_ND = Int8Weight(w13_2FD.values.flatten(0, 1), w13_2FD.scale.flatten(0, 1))
        hidden_TF = swiglu(int8_linear(self.sequence.gather_from(x_TD), w13_ND))
        return self.sequence.reduce_scatter_to(int8_linear(hidden_TF, self.held("w2_DF")))


class QuantisedExperts(QuantisedModule):
    """:class:`~mmtrain.model.moe.experts.Experts` in int8.

    Attributes:
        call: how tokens get to the experts and back; it multiplies by :meth:`products`.
    """

    def __init__(self, source: Experts, grouped: bool) -> None:
        super().__init__(source, grouped)
        self.call = source.call

    def forward(self, x_TD: Tensor, plan: Route) -> Tensor:
        """Return the weighted sum over each token's kept experts, [T, D]."""
        return self.call(self, x_TD, plan)

    def products(self, x_RD: Tensor, offset_E: Tensor) -> Tensor:
        """Run rows sorted by expert, [R, D] to [R, D]; rows from `offset_E[-1]` on are nobody's and unwritten."""
        return grouped_int8_mlp(x_RD, self.held("w13_E2FD"), self.held("w2_EDF"), offset_E)

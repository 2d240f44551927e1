"""The SwiGLU feed-forward of several experts, over rows sorted by expert. README.md here has the formulas."""

from mmkernels.grouped_mlp.api import (
    grouped_gate_up,
    grouped_mlp,
    grouped_mlp_forward,
    grouped_mlp_input_grad,
    grouped_weight_grad,
)

__all__ = ["grouped_gate_up", "grouped_mlp", "grouped_mlp_forward", "grouped_mlp_input_grad", "grouped_weight_grad"]

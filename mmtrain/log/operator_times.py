"""Time of a CPU by kind of operator, out of torch's profiler: what a step without kernels of a device is made of."""

from __future__ import annotations

import re

import torch

from mmtrain.log.kernel_times import COMMUNICATION, OPTIMIZER, OTHER, PRODUCTS, KindTime, summed

KINDS: dict[str, tuple[str, ...]] = {
    COMMUNICATION: ("gloo:", "c10d::", "record_param_comms"),
    OPTIMIZER: ("adam", "_foreach", "optimizer.", "vector_norm"),  # clipping is its too
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "grouped_mm", "mkldnn_linear"),
    "softmax attention": ("scaled_dot_product", "flash_attention"),
    "norms": ("norm",),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}
"""Parts of operators' names, in lower case, by kind; the first kind that fits takes the operator."""
OURS = "our autograd functions"
"""Those of no kind above, without the operators of torch that they call."""
_CLASS = re.compile(r"_?[A-Z]\w*[A-Za-z]")  # torch's own end in a digit: AddBackward0


def operator_kind(name: str) -> str:
    """Return what an operator does, by its name."""
    lower = name.lower()
    found = next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), None)
    return found or (OURS if _CLASS.fullmatch(name) else OTHER)


def operator_times(profiler: torch.profiler.profile) -> dict[str, KindTime]:
    """Return the time of each kind of operator, the longest first, without that of the operators that each one calls.

    Args:
        profiler: of a CPU, which has ended.
    """
    return summed(
        (operator_kind(one.key), round(one.self_cpu_time_total * 1e3), one.count) for one in profiler.key_averages()
    )

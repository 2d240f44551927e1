"""Argument checks of largest logits. They run before any work and never wait for a GPU.

Legend: N rows, V columns of the vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_tensor
from mmkernels.common.errors import KernelArgumentError


def check_arguments(logits_NV: Tensor, known: int) -> None:
    """Refuse logits without anything in them, or whose columns are not contiguous, and a vocabulary without ids.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor("logits_NV", logits_NV, 2, ALL_DTYPES)
    if not logits_NV.numel():
        raise KernelArgumentError("logits_NV", f"shape {list(logits_NV.shape)}", "at least one row and one column")
    if known < 1:
        raise KernelArgumentError("known", known, "at least 1")

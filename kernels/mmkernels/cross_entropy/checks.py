"""Argument checks of cross-entropy. They run before any work and never wait for a GPU.

Legend: C tokens, V columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_kind
from mmkernels.common.errors import KernelArgumentError


def check_logits(logits_CV: Tensor, labels_C: Tensor) -> None:
    """Refuse logits and labels that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_kind("logits_CV", logits_CV, 2, ALL_DTYPES)
    if not logits_CV.is_contiguous():
        raise KernelArgumentError("logits_CV", f"strides {list(logits_CV.stride())}", "a contiguous tensor")
    check_kind("labels_C", labels_C, 1, (torch.int64,))
    _check_beside("labels_C", labels_C, logits_CV)


def check_statistics(logits_CV: Tensor, **statistics: Tensor) -> None:
    """Refuse statistics (by name, one number a row) that do not belong to the logits; errors as above."""
    for name, x_C in statistics.items():
        check_kind(name, x_C, 1, (torch.promote_types(logits_CV.dtype, torch.float32),))
        _check_beside(name, x_C, logits_CV)


def _check_beside(name: str, x: Tensor, logits_CV: Tensor) -> None:
    if x.shape[0] != logits_CV.shape[0]:
        raise KernelArgumentError(name, f"{x.shape[0]} elements", f"one a row of logits_CV, {logits_CV.shape[0]}")
    if x.device != logits_CV.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of logits_CV, {logits_CV.device}")

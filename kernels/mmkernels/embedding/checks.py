"""Argument checks of the embedding's gradient. They run before any work and never wait for a GPU.

Legend: T tokens, V rows of the table, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, TRITON_DTYPES, check_kind
from mmkernels.common.errors import KernelArgumentError


def check_arguments(total_VD: Tensor, tokens_T: Tensor, dy_TD: Tensor) -> None:
    """Refuse a sum, tokens and gradients that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_kind("total_VD", total_VD, 2, (torch.float32, torch.float64))
    if not total_VD.is_contiguous():
        raise KernelArgumentError("total_VD", f"strides {list(total_VD.stride())}", "a contiguous tensor")
    if total_VD.requires_grad:
        raise KernelArgumentError("total_VD", "requires_grad=True", "a sum without gradient (it is changed in place)")
    check_kind("tokens_T", tokens_T, 1, (torch.int64,))
    check_kind("dy_TD", dy_TD, 2, ALL_DTYPES if total_VD.dtype == torch.float64 else TRITON_DTYPES)
    shape = [tokens_T.shape[0], total_VD.shape[1]]
    if list(dy_TD.shape) != shape:
        raise KernelArgumentError("dy_TD", f"shape {list(dy_TD.shape)}", f"{shape}, a row a token as wide as total_VD")
    for name, x in (("tokens_T", tokens_T), ("dy_TD", dy_TD)):
        if x.device != total_VD.device:
            raise KernelArgumentError(name, f"device {x.device}", f"the device of total_VD, {total_VD.device}")

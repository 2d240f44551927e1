"""Argument checks of the router's functions. They run before any work and never wait for a GPU.

Legend: T tokens, N tokens whose statistics are taken together, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_kind
from mmkernels.common.errors import KernelArgumentError

MAX_EXPERTS = 1024
"""One program of the statistics' kernels holds all logits of a token; `mmkernels.moe.route` takes no more either."""


def check_logits_arguments(x_TD: Tensor, weight_ED: Tensor) -> None:
    """Refuse tokens and a weight that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_kind("x_TD", x_TD, 2, ALL_DTYPES)
    check_kind("weight_ED", weight_ED, 2, (torch.float32,))
    if weight_ED.shape[1] != x_TD.shape[1]:
        want = f"[E, {x_TD.shape[1]}] for x_TD {list(x_TD.shape)}"
        raise KernelArgumentError("weight_ED", f"shape {list(weight_ED.shape)}", want)
    _check_experts("weight_ED", weight_ED.shape[0])
    if weight_ED.device != x_TD.device:
        raise KernelArgumentError("weight_ED", f"device {weight_ED.device}", f"the device of x_TD, {x_TD.device}")


def check_balance_arguments(logits_NE: Tensor) -> None:
    """Refuse logits of another kind, or of too many experts; errors as above."""
    check_kind("logits_NE", logits_NE, 2, (torch.float32, torch.float64))
    _check_experts("logits_NE", logits_NE.shape[1])


def _check_experts(name: str, experts: int) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise KernelArgumentError(name, f"{experts} experts", f"1 to {MAX_EXPERTS}")

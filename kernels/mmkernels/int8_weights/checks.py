"""Argument checks of products with int8 weights. They run before any work and never wait for a GPU.

Legend: T tokens, D and E widths of a projection; R rows sorted by expert, E experts, D model width, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import check_kind, check_tensor
from mmkernels.common.errors import KernelArgumentError
from mmkernels.int8_weights.int8_weight import GROUP, Int8Weight, scale_columns

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Of the activations. Float16 is left out: a sum of products with values up to 127 leaves its range."""


def check_linear(x_TD: Tensor, weight_ED: Int8Weight) -> None:
    """Refuse tokens and a weight that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_tensor("x_TD", x_TD, 2, DTYPES)
    _check_weight("weight_ED", weight_ED, 2, "x_TD", x_TD)
    _check_shape("weight_ED.values", weight_ED.values, (weight_ED.values.shape[0], x_TD.shape[1]), "x_TD", x_TD)
    _check_inference("x_TD", x_TD)


def check_mlp(x_RD: Tensor, w13_E2FD: Int8Weight, w2_EDF: Int8Weight, offset_E: Tensor) -> None:
    """Refuse rows, weights and offsets that do not fit together; errors as above."""
    check_tensor("x_RD", x_RD, 2, DTYPES)
    _check_weight("w13_E2FD", w13_E2FD, 4, "x_RD", x_RD)
    _check_weight("w2_EDF", w2_EDF, 3, "x_RD", x_RD)
    experts, _, inner, _ = w13_E2FD.values.shape
    width = x_RD.shape[1]
    _check_shape("w13_E2FD.values", w13_E2FD.values, (experts, 2, inner, width), "x_RD", x_RD)
    _check_shape("w2_EDF.values", w2_EDF.values, (experts, width, inner), "w13_E2FD.values", w13_E2FD.values)
    check_kind("offset_E", offset_E, 1, (torch.int32,))
    _check_shape("offset_E", offset_E, (experts,), "w13_E2FD.values", w13_E2FD.values)
    _check_device("offset_E", offset_E, "x_RD", x_RD)
    _check_inference("x_RD", x_RD)


def _check_weight(name: str, weight: object, ndim: int, like_name: str, like: Tensor) -> None:
    if not isinstance(weight, Int8Weight):
        raise KernelArgumentError(name, type(weight).__name__, "an Int8Weight, as quantise returns it")
    values, scale = weight
    check_tensor(f"{name}.values", values, ndim, (torch.int8,))
    check_tensor(f"{name}.scale", scale, ndim, (torch.float32,))
    groups = scale_columns(values.shape[-1], grouped=True)
    if scale.shape[:-1] != values.shape[:-1] or scale.shape[-1] not in (1, groups):
        lead = ", ".join(map(str, values.shape[:-1]))
        allowed = f"[{lead}, 1] or, a scale for every {GROUP} columns, [{lead}, {groups}]"
        raise KernelArgumentError(f"{name}.scale", f"shape {list(scale.shape)}", allowed)
    for part, x in ((f"{name}.values", values), (f"{name}.scale", scale)):
        _check_device(part, x, like_name, like)


def _check_shape(name: str, x: Tensor, want: tuple[int, ...], like_name: str, like: Tensor) -> None:
    if tuple(x.shape) != want:
        raise KernelArgumentError(name, f"shape {list(x.shape)}", f"{list(want)} with {like_name} {list(like.shape)}")


def _check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of {like_name}, {like.device}")


def _check_inference(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelArgumentError(name, "a tensor that wants a gradient", "inference alone, under torch.no_grad()")

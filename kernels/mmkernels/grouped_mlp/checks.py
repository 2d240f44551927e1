"""Argument checks of the experts' MLP. They run before any work and never wait for a GPU.

Legend: R rows sorted by expert, E experts, D model width, F expert width; M and N widths of one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_kind
from mmkernels.common.errors import KernelArgumentError


def check_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> None:
    """Refuse rows, weights and offsets that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_kind("x_RD", x_RD, 2, ALL_DTYPES)
    _check_weights(w13_E2FD, w2_EDF, "x_RD", x_RD)
    _check_shape("w13_E2FD", w13_E2FD, (*w13_E2FD.shape[:3], x_RD.shape[1]), "x_RD", x_RD)
    _check_offsets(offset_E, w13_E2FD.shape[0], "x_RD", x_RD)


def check_first(x_RD: Tensor, w13_E2FD: Tensor, offset_E: Tensor) -> None:
    """Refuse rows, first weights and offsets that do not fit together; errors as above."""
    check_kind("x_RD", x_RD, 2, ALL_DTYPES)
    check_kind("w13_E2FD", w13_E2FD, 4, (x_RD.dtype,))
    experts, _, inner, _ = w13_E2FD.shape
    _check_shape("w13_E2FD", w13_E2FD, (experts, 2, inner, x_RD.shape[1]), "x_RD", x_RD)
    _check_device("w13_E2FD", w13_E2FD, "x_RD", x_RD)
    _check_offsets(offset_E, experts, "x_RD", x_RD)


def check_grad(dy_RD: Tensor, gate_up_R2F: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor) -> None:
    """Refuse a gradient, a first product, weights and offsets that do not fit together; errors as above."""
    check_kind("gate_up_R2F", gate_up_R2F, 2, ALL_DTYPES)
    _check_weights(w13_E2FD, w2_EDF, "gate_up_R2F", gate_up_R2F)
    rows, width = gate_up_R2F.shape[0], 2 * w13_E2FD.shape[2]
    _check_shape("gate_up_R2F", gate_up_R2F, (rows, width), "w13_E2FD", w13_E2FD)
    check_kind("dy_RD", dy_RD, 2, (gate_up_R2F.dtype,))
    _check_shape("dy_RD", dy_RD, (rows, w13_E2FD.shape[3]), "w13_E2FD", w13_E2FD)
    _check_device("dy_RD", dy_RD, "gate_up_R2F", gate_up_R2F)
    _check_offsets(offset_E, w13_E2FD.shape[0], "gate_up_R2F", gate_up_R2F)


def check_weight_grad(dout_RN: Tensor, in_RM: Tensor, offset_E: Tensor) -> None:
    """Refuse a product's gradient, its input and offsets that do not fit together; errors as above."""
    check_kind("dout_RN", dout_RN, 2, ALL_DTYPES)
    check_kind("in_RM", in_RM, 2, (dout_RN.dtype,))
    _check_shape("in_RM", in_RM, (dout_RN.shape[0], in_RM.shape[1]), "dout_RN", dout_RN)
    _check_device("in_RM", in_RM, "dout_RN", dout_RN)
    _check_offsets(offset_E, None, "dout_RN", dout_RN)


def _check_weights(w13_E2FD: Tensor, w2_EDF: Tensor, like_name: str, like: Tensor) -> None:
    check_kind("w13_E2FD", w13_E2FD, 4, (like.dtype,))
    check_kind("w2_EDF", w2_EDF, 3, (like.dtype,))
    experts, _, inner, width = w13_E2FD.shape
    _check_shape("w13_E2FD", w13_E2FD, (experts, 2, inner, width), like_name, like)
    _check_shape("w2_EDF", w2_EDF, (experts, width, inner), "w13_E2FD", w13_E2FD)
    for name, x in (("w13_E2FD", w13_E2FD), ("w2_EDF", w2_EDF)):
        _check_device(name, x, like_name, like)


def _check_offsets(offset_E: Tensor, experts: int | None, like_name: str, like: Tensor) -> None:
    check_kind("offset_E", offset_E, 1, (torch.int32,))
    if experts is not None and offset_E.shape[0] != experts:
        raise KernelArgumentError(
            "offset_E", f"shape {list(offset_E.shape)}", f"one an expert of w13_E2FD, [{experts}]"
        )
    _check_device("offset_E", offset_E, like_name, like)


def _check_shape(name: str, x: Tensor, want: tuple[int, ...], like_name: str, like: Tensor) -> None:
    if tuple(x.shape) != want:
        allowed = f"{list(want)} with {like_name} {list(like.shape)}"
        raise KernelArgumentError(name, f"shape {list(x.shape)}", allowed)


def _check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise KernelArgumentError(name, f"device {x.device}", f"the device of {like_name}, {like.device}")

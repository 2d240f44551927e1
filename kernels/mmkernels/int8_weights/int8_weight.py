"""Weights in int8: how they are made of floating-point ones, turned back, and cut into shards.

Legend: N rows (outputs), K columns (inputs), G scales of a row: 1, or one for every 128 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES
from mmkernels.common.errors import KernelArgumentError

GROUP = 128
"""Columns that share a scale, where a row has more than one."""
LARGEST = 127
"""Values lie in [-127, 127]: symmetric, so that -W has the negative values of W."""
_ELEMENTS = 1 << 24
"""Elements that are quantised at once: bounds the fp32 scratch to a few times 64 MiB."""


class Int8Weight(NamedTuple):
    """Matrices in int8, W[n, k] = values[n, k] * scale[n, k // 128], or scale[n, 0] where a row has one scale.

    Attributes:
        values: int8 [..., N, K], in [-127, 127].
        scale: fp32 [..., N, G], at least 0; 0 where all that it scales is 0. G is 1, or ceil(K / 128).
    """

    values: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes


def scale_columns(columns: int, grouped: bool) -> int:
    """Return G, the scales of a row of so many columns."""
    return -(-columns // GROUP) if grouped else 1


def empty_int8(shape: tuple[int, ...], grouped: bool, device: torch.device | str | None = None) -> Int8Weight:
    """Make a weight of this shape [..., N, K] to be filled by :func:`quantise_into`."""
    values = torch.empty(shape, dtype=torch.int8, device=device)
    scale = torch.empty((*shape[:-1], scale_columns(shape[-1], grouped)), dtype=torch.float32, device=device)
    return Int8Weight(values, scale)


def quantise(weight: Tensor, grouped: bool = False, reduce: Callable[[Tensor], Tensor] | None = None) -> Int8Weight:
    """Round a weight to int8: scale = absmax / 127 of a row or group, value = W / scale to the nearest, ties to even.

    Args:
        weight: [..., N, K], any float dtype.
        grouped: a scale for every 128 columns, else one a row.
        reduce: see :func:`quantise_into`.

    Raises:
        KernelArgumentError: the weight is no float matrix, or holds NaN or infinity.
    """
    _check(weight)
    made = empty_int8(tuple(weight.shape), grouped, weight.device)
    quantise_into(made, weight, reduce)
    return made


@torch.no_grad()
def quantise_into(target: Int8Weight, weight: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """Fill an int8 weight from a floating-point one, which may lie on another device, some rows at a time.

    Args:
        target: of the weight's shape; the shape of its scales says whether rows are cut into groups.
        weight: [..., N, K], any float dtype.
        reduce: given absmax [rows, G] in fp32, returns that over all ranks that hold other columns of these rows, so
            that a shard of columns has the scales of the whole row. All of these ranks must have as many rows.

    Raises:
        KernelArgumentError: the weight is no float matrix, is of another shape, or holds NaN or infinity.
    """
    _check(weight)
    if weight.shape != target.values.shape:
        raise KernelArgumentError("weight", f"shape {list(weight.shape)}", str(list(target.values.shape)))
    width = weight.shape[-1]
    step = max(1, _ELEMENTS // max(width, 1))
    flat = (weight.reshape(-1, width), target.values.view(-1, width), target.scale.view(-1, target.scale.shape[-1]))
    for part_NK, values_NK, scale_NG in zip(*(x.split(step) for x in flat), strict=True):
        _fill(part_NK.to(values_NK.device), values_NK, scale_NG, reduce)


def _fill(weight_NK: Tensor, values_NK: Tensor, scale_NG: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> None:
    wide_NK = weight_NK.float()  # float64 too: a scale is fp32
    absmax_NG = torch.stack([part.abs().amax(1) for part in wide_NK.split(_span(scale_NG, wide_NK.shape[1]), 1)], 1)
    if not torch.isfinite(absmax_NG).all():
        raise KernelArgumentError("weight", "NaN or infinity", "finite numbers")
    torch.div(absmax_NG if reduce is None else reduce(absmax_NG), LARGEST, out=scale_NG)
    # Where a scale is 0 (all is 0, or so small that fp32 cannot hold a 127th of it), values are 0 and not NaN.
    divisor_NG = torch.where(scale_NG > 0, scale_NG, torch.inf)
    values_NK.copy_((wide_NK / _spread(divisor_NG, wide_NK.shape[1])).round_().clamp_(-LARGEST, LARGEST))


def dequantise(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """Return [..., N, K] in a float dtype: multiplied in fp32 (float64 for that), rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.values.to(wide) * _spread(weight.scale.to(wide), weight.values.shape[-1])).to(dtype)


def rows(weight: Int8Weight, part: slice) -> Int8Weight:
    """Return some rows (of N): a view. They are those of the whole, values and scales."""
    return Int8Weight(weight.values[..., part, :], weight.scale[..., part, :])


def columns(weight: Int8Weight, part: slice) -> Int8Weight:
    """Return some columns (of K), values as a view. Products with all the parts add up to the product with the whole.

    Raises:
        KernelArgumentError: rows have a scale a group, and the part begins within one, or ends within one that goes on.
    """
    first, last, _ = part.indices(weight.values.shape[-1])
    scale = weight.scale
    if scale.shape[-1] > 1:
        if first % GROUP or (last % GROUP and last != weight.values.shape[-1]):
            raise KernelArgumentError("part", f"columns {first} to {last}", f"whole groups of {GROUP} columns")
        scale = scale[..., first // GROUP : -(-last // GROUP)]
    return Int8Weight(weight.values[..., first:last], scale)


def _check(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in ALL_DTYPES or weight.ndim < 2 or not weight.shape[-1]:
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise KernelArgumentError("weight", got, "a float tensor [..., N, K] with a column")


def _span(scale: Tensor, width: int) -> int:
    """Columns that share a scale."""
    return width if scale.shape[-1] == 1 else GROUP


def _spread(scale: Tensor, width: int) -> Tensor:
    """Return a scale for each column, or one that is broadcast to all."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(GROUP, -1)[..., :width]

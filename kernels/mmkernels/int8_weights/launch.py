"""Products with int8 weights through the Triton kernel, and its launch shapes (all tunables are here).

Legend: M rows of x, N outputs, K inputs, E experts, G scales of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmkernels.int8_weights import eager
from mmkernels.int8_weights.int8_weight import GROUP, Int8Weight, rows
from mmkernels.int8_weights.kernels import (
    int8_dequantise_kernel,
    int8_join_kernel,
    int8_product_kernel,
    int8_row_kernel,
)


class Shape(NamedTuple):
    """Rows, outputs and inputs of a program's blocks, its warps and the loads that it has under way."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


SHAPES = (
    Shape(16, 32, 256, 4, 4),
    Shape(32, 64, 128, 4, 4),
    Shape(64, 64, 128, 4, 4),
    Shape(128, 128, 64, 8, 3),
)
"""By rows, the first that holds them all, else the last. The first and the third are the best on an H200 of those that
`kernels/bench/gpu/int8_shapes.py` tries, at 1 row (which has a kernel of its own since) and at 64. The others are not
tuned."""
GROUPED = Shape(16, 32, 128, 2, 6)
"""In place of the first where every 128 columns have a scale, which no block may pass; as good at one row."""
PROGRAMS = 2
"""Programs a multiprocessor for which K is split, where outputs alone give fewer."""
LEAST_STEPS = 4
"""Blocks of K that a split has at least: fewer do not fill the pipeline of loads."""
ROW = 8, 512, 2, 4
"""Outputs, inputs, warps and loads under way of a program that multiplies one row: of 80 tried on an H200 the best in
three of a 7B model's four widths, and within 1.1% of it in the fourth."""
_JOINED = 1024  # elements that a program adds up the parts of
_DEQUANTISED = 8, 1024  # rows and columns that a program turns into floats: 64 elements a thread, by 16 bytes
_INTERPRETED_PROCESSORS = 4


def triton_product(
    x_MK: Tensor, weight: Int8Weight, offset_E: Tensor | None = None, shape: Shape | None = None,
    parts: int | None = None,
) -> Tensor:  # fmt: skip
    """``x W^T``, [M, N] in the dtype of x: the backend "triton", whose arguments have been checked.

    Args:
        x_MK: bfloat16 or float32, the last dimension contiguous.
        weight: [N, K]; with offsets [E, N, K].
        offset_E: int32, the row after each expert's last; rows past the last one's are not written. None: all rows
            belong to the one weight.
        shape: of a program's blocks; None: that of :data:`SHAPES`.
        parts: into which K is split, at most; None: as :func:`split_k` says. Experts' is never split.
    """
    values, scale = weight
    count, (outputs, inputs) = x_MK.shape[0], values.shape[-2:]
    experts = 0 if offset_E is None else values.shape[0]
    y_MN = torch.empty(count, outputs, dtype=x_MK.dtype, device=x_MK.device)
    if not y_MN.numel():
        return y_MN
    shape = shape_for(-(-count // max(experts, 1)), scale.shape[-1] > 1) if shape is None else shape
    # Each expert's last tile may be partly filled, and no more experts have rows than there are rows.
    tiles = count // shape.block_m + min(experts, count) if experts else triton.cdiv(count, shape.block_m)
    programs = tiles * triton.cdiv(outputs, shape.block_n)
    splits, steps = 1, triton.cdiv(inputs, shape.block_k)
    if not experts:  # of which there are programs enough
        splits, steps = split_k(programs, steps, _processors(x_MK)) if parts is None else cut(steps, parts)
    into = y_MN if splits == 1 else torch.empty(splits, count, outputs, dtype=torch.float32, device=x_MK.device)
    int8_product_kernel[(programs, splits)](
        x_MK, values, scale, offset_E, into, count, tiles,
        x_MK.stride(0), values.stride(0) if experts else 0, values.stride(-2),
        scale.stride(0) if experts else 0, scale.stride(-2),
        N=outputs, K=inputs, GROUP=GROUP if scale.shape[-1] > 1 else 0, EXPERTS=experts,
        EXPERT_BLOCK=triton.next_power_of_2(max(experts, 1)), STEPS=steps,
        BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_K=shape.block_k,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if splits > 1:
        int8_join_kernel[(triton.cdiv(y_MN.numel(), _JOINED),)](into, y_MN, y_MN.numel(), SPLITS=splits, BLOCK=_JOINED)
    return y_MN


def row_product(x_1K: Tensor, weight_NK: Int8Weight) -> Tensor:
    """``x W^T``, [1, N] in the dtype of x, for one row of x [1, K]: each weight is multiplied where it is loaded."""
    values, scale = weight_NK
    (outputs, inputs), (block_n, block_k, warps, stages) = values.shape, ROW
    y_1N = torch.empty(1, outputs, dtype=x_1K.dtype, device=x_1K.device)
    if outputs:
        int8_row_kernel[(triton.cdiv(outputs, block_n),)](
            x_1K, values, scale, y_1N, outputs, values.stride(0), scale.stride(0), K=inputs,
            GROUP=GROUP if scale.shape[1] > 1 else 0, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
    return y_1N


def dequantised_product(x_MK: Tensor, weight_NK: Int8Weight) -> Tensor:
    """``x W^T``, [M, N] in the dtype of x, for many rows: W in that dtype, some rows at a time, and torch's product.

    The memory of W is the caching allocator's, which gives every layer the same.
    """
    outputs, inputs = weight_NK.values.shape
    step = max(1, eager.ELEMENTS // max(inputs, 1))
    if outputs <= step:
        return x_MK @ triton_dequantise(weight_NK, x_MK.dtype).t()
    y_MN = torch.empty(x_MK.shape[0], outputs, dtype=x_MK.dtype, device=x_MK.device)
    for first in range(0, outputs, step):
        part = slice(first, min(first + step, outputs))
        torch.mm(x_MK, triton_dequantise(rows(weight_NK, part), x_MK.dtype).t(), out=y_MN[:, part])
    return y_MN


def triton_dequantise(weight_NK: Int8Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight in a float dtype, [N, K]: multiplied in fp32, rounded once."""
    values, scale = weight_NK
    (outputs, inputs), (block_n, block_k) = values.shape, _DEQUANTISED
    w_NK = torch.empty(outputs, inputs, dtype=dtype, device=values.device)
    if w_NK.numel():
        int8_dequantise_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(inputs, block_k))](
            values, scale, w_NK, outputs, values.stride(0), scale.stride(0), K=inputs,
            GROUP=GROUP if scale.shape[1] > 1 else 0, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return w_NK


def shape_for(rows: int, grouped: bool = False) -> Shape:
    """Return the launch shape for so many rows of x a weight, which may have a scale for every group of columns."""
    shape = next((shape for shape in SHAPES if rows <= shape.block_m), SHAPES[-1])
    return GROUPED if grouped and shape is SHAPES[0] else shape


def split_k(programs: int, steps: int, processors: int) -> tuple[int, int]:
    """Return into how many parts K is split, and the blocks of K in each, the last of which may be past the end.

    Args:
        programs: of one part.
        steps: blocks of K in all.
        processors: multiprocessors to fill.
    """
    return cut(steps, min(PROGRAMS * processors // programs, steps // LEAST_STEPS))


def cut(steps: int, parts: int) -> tuple[int, int]:
    """Return into how many parts, at most so many, blocks of K are cut evenly, and the blocks of each."""
    each = -(-steps // max(1, parts))
    return -(-steps // each), each


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _INTERPRETED_PROCESSORS

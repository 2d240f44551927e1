"""Launches of the kernels for Hopper, with all their tunables.

Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mmkernels.softmax.hopper.forward import softmax_hopper_kernel
from mmkernels.softmax.hopper.key_gradients import softmax_hopper_dkv_kernel
from mmkernels.softmax.hopper.query_gradients import softmax_hopper_dq_kernel
from mmkernels.softmax.hopper.tiles import BLOCK_KEYS, BLOCK_QUERIES, Documents

STAGES = {64: 4, 128: 2}
"""Blocks of keys and values in shared memory, by head width: 128 KiB."""
STEPS_AHEAD = 2
"""Blocks of queries in shared memory, for the gradients of keys."""
LAUNCH = {"num_warps": 4, "maxnreg": 168}
"""Of 384 threads, to share out among them: 240 registers a thread for those that compute, 24 for those that copy."""
ENOUGH_UNITS, MANY_UNITS = 2, 4
"""Units a multiprocessor below which the heads of a group are shared out, and those that it gets then at least.

On an H200, 8K tokens in documents of 1,024: with 64:8 heads (3.9 units) 354 TFLOP/s backward, shared 272; with 16:2
heads (1.0) 125, shared 258.
"""


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32."""
    q_THD, k_SGD, v_SGD = (_for_copies(x) for x in (q_THD, k_SGD, v_SGD))
    o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_HT = torch.empty(q_THD.shape[1], q_THD.shape[0], dtype=torch.float32, device=q_THD.device)
    grid, tiles, shape = _query_units(q_THD, k_SGD, documents)
    if grid:
        softmax_hopper_kernel[grid](
            _descriptor(q_THD, BLOCK_QUERIES), *(_descriptor(x, BLOCK_KEYS) for x in (k_SGD, v_SGD)), tiles, o_THD,
            lse_HT, tiles.shape[0] * shape["PAIRS"], scale, q_THD.shape[0],
            *(x.stride(1) for x in (q_THD, k_SGD, v_SGD)), *o_THD.stride()[:2], **shape, **LAUNCH,
        )  # fmt: skip
    return o_THD, lse_HT


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in the dtype of q; sums are in one order, so that the same inputs give the same bits."""
    inputs, lse_HT = [_for_copies(x) for x in (q_THD, do_THD, k_SGD, v_SGD)], lse_HT.contiguous()
    queries = [_descriptor(x, BLOCK_QUERIES) for x in inputs[:2]] if inputs[0].shape[0] else []
    dq_THD, delta_HT = _query_gradients(inputs, queries, o_THD, lse_HT, documents, scale)
    return dq_THD, *_key_gradients(inputs, queries, lse_HT, delta_HT, documents, scale)


def _query_gradients(
    inputs: list[Tensor], queries: list[TensorDescriptor], o_THD: Tensor, lse_HT: Tensor, documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of q, and `delta = do . o` [H, T]; inputs are q, do, k and v."""
    q_THD, _, k_SGD, v_SGD = inputs
    dq_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    delta_HT = torch.empty_like(lse_HT)
    grid, tiles, shape = _query_units(q_THD, k_SGD, documents)
    if grid:
        softmax_hopper_dq_kernel[grid](
            *queries, *(_descriptor(x, BLOCK_KEYS) for x in (k_SGD, v_SGD)), tiles, o_THD, lse_HT, delta_HT, dq_THD,
            tiles.shape[0] * shape["PAIRS"], scale, q_THD.shape[0], *(x.stride(1) for x in inputs), *o_THD.stride()[:2],
            **shape, **LAUNCH,
        )  # fmt: skip
    return dq_THD, delta_HT


def _key_gradients(
    inputs: list[Tensor], queries: list[TensorDescriptor], lse_HT: Tensor, delta_HT: Tensor, documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of keys and values; inputs are q, do, k and v."""
    q_THD, _, k_SGD, v_SGD = inputs
    (keys, kv_heads, width), group = k_SGD.shape, q_THD.shape[1] // k_SGD.shape[1]
    tiles, processors = documents.key_tiles(), _processors(q_THD.device)
    # Each split has a float32 row of its own: not for a few tiles of a long one (512K tokens: 16 GiB for none).
    shared = 2 * BLOCK_KEYS * tiles.shape[0] >= keys
    splits = splits_of(tiles.shape[0] * kv_heads, group, processors) if shared else 1
    units = tiles.shape[0] * kv_heads * splits
    number = torch.float32 if splits > 1 else k_SGD.dtype
    dkv_2XSGD = torch.empty(2, splits, keys, kv_heads, width, dtype=number, device=q_THD.device)
    if units and q_THD.shape[0]:
        half = BLOCK_KEYS // 2
        softmax_hopper_dkv_kernel[(min(units, processors),)](
            *queries, *(_descriptor(x, half) for x in (k_SGD, v_SGD)), tiles, lse_HT, delta_HT, *dkv_2XSGD, units,
            scale, q_THD.shape[0], keys, splits, *(x.stride(1) for x in inputs), G=kv_heads, GROUP=group,
            BM=BLOCK_QUERIES, BN=half, D=width, STAGES=STEPS_AHEAD, **LAUNCH,
        )  # fmt: skip
    dk_SGD, dv_SGD = dkv_2XSGD[:, 0] if splits == 1 else dkv_2XSGD.sum(1).to(k_SGD.dtype)
    return dk_SGD, dv_SGD


def _query_units(
    q_THD: Tensor, k_SGD: Tensor, documents: Documents
) -> tuple[tuple[int] | None, Tensor, dict[str, int]]:
    """Programs of a kernel over tiles of queries (None if there is nothing to do), its tiles, and its shape."""
    (_, heads, width), group = q_THD.shape, q_THD.shape[1] // k_SGD.shape[1]
    heads_of_a_unit = 2 if group % 2 == 0 else 1
    tiles, pairs = documents.query_tiles(heads_of_a_unit), heads // heads_of_a_unit
    units = tiles.shape[0] * pairs
    shape = {"PAIRS": pairs, "GROUP": group, "HEADS": heads_of_a_unit, "BM": BLOCK_QUERIES, "BN": BLOCK_KEYS}
    grid = (min(units, _processors(q_THD.device)),) if units else None
    return grid, tiles, {**shape, "D": width, "STAGES": STAGES[width]}


def splits_of(units: int, group: int, processors: int) -> int:
    """Units that share the heads of a key/value head: a divisor of these, so that all multiprocessors have work."""
    wanted = -(-MANY_UNITS * processors // max(1, units)) if units < ENOUGH_UNITS * processors else 1
    return next(n for n in range(min(group, wanted), 0, -1) if group % n == 0)


def _for_copies(x_THD: Tensor) -> Tensor:
    """The tensor itself if tiles of it can be copied: it begins at 16 bytes, and so do its rows and heads."""
    fits = x_THD.stride(2) == 1 and (x_THD.stride(0) | x_THD.stride(1)) % 8 == 0 and x_THD.data_ptr() % 16 == 0
    if fits and x_THD.stride(0) >= x_THD.shape[1] * x_THD.stride(1):
        return x_THD
    return torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device).copy_(x_THD)  # one token has any stride


def _descriptor(x_THD: Tensor, rows: int) -> TensorDescriptor:
    """What the copying warp needs to know of a tensor, for tiles of `rows` tokens of one head."""
    tokens, heads, width = x_THD.shape
    columns = (heads - 1) * x_THD.stride(1) + width
    return TensorDescriptor(x_THD, [tokens, columns], [x_THD.stride(0), 1], [rows, width], _layout(rows, width))


@functools.cache
def _layout(rows: int, width: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)  # takes 20 us


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

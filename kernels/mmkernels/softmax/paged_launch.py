"""One decode step over keys in pages through the Triton kernels, with their launch shapes (all tunables are here).

The shapes are reckoned for an H200, and no others have been tried. A whole decode step of `hybrid_7b` at 4M tokens,
most of whose bytes are keys, has 91% of its bytes' floor (mmtrain/bench/results/2026-11-30-infer-h200).

Legend: N documents, H heads, G key/value heads, D head width, P pages, L tokens of a page, M pages of a document at
most.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.softmax.paged_kernel import paged_join_kernel, paged_step_kernel

BLOCK_S = 64
"""Keys of a block: 16 KB of each of keys and values at a head width of 128 in 16 bits."""
LEAST_ROWS = 16
"""Rows of the smallest product of tensor cores; query heads of a key/value head are rounded up to it."""
LEAST_BLOCKS = 4
"""Blocks of a run at least, 256 keys: a run writes 8 KB a key/value head and reads 512 bytes a key."""
MOST_SPLITS = 128
PROGRAMS = 512
"""Programs to have at least: about two on each processor of an H200, twice over."""
MOST_BLOCKS = 128
"""Blocks of a run at most, where splits allow: one long document among short ones is read by many programs too."""

JOINED_PER_THREAD = 32
"""Elements of the runs' outputs that a thread of the join holds."""


def splits_of(documents: int, kv_heads: int, most_keys: int) -> int:
    """Runs that each document's keys are cut into, a power of two; known without reading the device."""
    blocks = triton.cdiv(most_keys, BLOCK_S)
    wanted = max(triton.cdiv(PROGRAMS, max(1, documents * kv_heads)), triton.cdiv(blocks, MOST_BLOCKS))
    useful = max(1, triton.cdiv(blocks, LEAST_BLOCKS))
    return triton.next_power_of_2(min(wanted, useful, MOST_SPLITS))


def step(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, k_PLGD: Tensor, v_PLGD: Tensor, table_NM: Tensor, keys_N: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write new keys and values to their pages, and return output [N, H, D] and log-sum-exp [N, H]."""
    (documents, heads, width), (page, kv_heads) = q_NHD.shape, k_PLGD.shape[1:3]
    o_NHD = torch.empty(documents, heads, width, dtype=q_NHD.dtype, device=q_NHD.device)
    lse_NH = torch.empty(documents, heads, dtype=torch.float32, device=q_NHD.device)
    if not documents:
        return o_NHD, lse_NH
    splits = splits_of(documents, kv_heads, table_NM.shape[1] * page)
    part_NHSD = torch.empty(documents, heads, splits, width, dtype=torch.float32, device=q_NHD.device)
    part_lse_NHS = torch.empty(documents, heads, splits, dtype=torch.float32, device=q_NHD.device)
    join_warps = max(1, min(8, splits * width // (32 * JOINED_PER_THREAD)))
    group, block_d = heads // kv_heads, max(16, triton.next_power_of_2(width))
    with torch.cuda.device_of(q_NHD):
        paged_step_kernel[(documents, kv_heads, splits)](
            q_NHD, k_NGD, v_NGD, k_PLGD, v_PLGD, table_NM, keys_N, part_NHSD, part_lse_NHS, scale,
            *q_NHD.stride()[:2], *k_NGD.stride()[:2], *v_NGD.stride()[:2], *k_PLGD.stride()[:3], table_NM.stride(0),
            GROUP=group, BLOCK_H=max(LEAST_ROWS, triton.next_power_of_2(group)), WIDTH=width, BLOCK_D=block_d,
            PAGE=page, BLOCK_S=BLOCK_S, SPLITS=splits, LEAST=LEAST_BLOCKS,
            PRECISION="ieee" if q_NHD.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        paged_join_kernel[(documents, heads)](
            part_NHSD, part_lse_NHS, o_NHD, lse_NH, heads,
            WIDTH=width, BLOCK_D=block_d, SPLITS=splits, BLOCK_SPLITS=splits, num_warps=join_warps,
        )  # fmt: skip
    return o_NHD, lse_NH

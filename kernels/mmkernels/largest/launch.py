"""Largest logits through the Triton kernels, with the launch shapes (all tunables are here).

Legend: N rows, V columns of the vocabulary, S parts of a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.largest.kernels import largest_join_kernel, largest_part_kernel

BLOCK, WARPS, UNROLL = 1024, 4, 4
"""Columns that a program reads at once (16 bytes a thread in 16-bit types), its warps, and blocks under way."""
PROGRAMS = 8
"""Programs of a multiprocessor at a time, by their 59 registers a thread. 64 rows of 200,064 columns are 1,024
programs, of 13 blocks, on 132 multiprocessors; one row is 196. By reckoning; not tuned on a GPU."""


def triton_largest_logits(logits_NV: Tensor, known: int) -> Tensor:
    """Columns and whether rows are finite, int64 [2, N]: the backend "triton", whose caller has checked arguments.

    Args:
        logits_NV: bfloat16, float16 or float32.
        known: at most V.
    """
    rows, columns = logits_NV.shape
    blocks = blocks_of_part(rows, columns, _processors(logits_NV))
    parts = triton.cdiv(columns, blocks * BLOCK)
    device = logits_NV.device
    top_NS = torch.empty(rows, parts, dtype=torch.float32, device=device)
    column_NS, finite_NS = (torch.empty(rows, parts, dtype=torch.int32, device=device) for _ in range(2))
    found_2N = torch.empty(2, rows, dtype=torch.int64, device=device)
    with torch.cuda.device_of(logits_NV):
        largest_part_kernel[(rows, parts)](
            logits_NV, top_NS, column_NS, finite_NS, logits_NV.stride(0), columns, known, blocks,
            BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS,
        )  # fmt: skip
        largest_join_kernel[(rows,)](
            top_NS, column_NS, finite_NS, found_2N, parts,
            BLOCK_S=triton.next_power_of_2(triton.cdiv(columns, BLOCK)), num_warps=1,  # of most parts: one compilation
        )  # fmt: skip
    return found_2N


def blocks_of_part(rows: int, columns: int, processors: int) -> int:
    """Blocks that each program takes of a row, so that all programs are at work at once if rows are not too many."""
    parts = max(1, processors * PROGRAMS // rows)
    return triton.cdiv(triton.cdiv(columns, BLOCK), parts)


def _processors(x: Tensor) -> int:
    """Multiprocessors of the device; few on a CPU, whose interpreter then sees programs of several blocks."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1

"""Cross-entropy through the Triton kernels, with the launch shapes (all tunables are here).

Legend: C tokens, V columns of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mmkernels.cross_entropy.kernels import cross_entropy_gradient_kernel, cross_entropy_statistics_kernel

ROW_BLOCK, ROW_WARPS = 8192, 8
"""Columns that the one program of a row reads at once."""
BLOCK, WARPS = 4096, 8
"""Columns of a row that a program of the gradient takes."""


def triton_row_statistics(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Statistics of each row, [3, C]: the backend "triton" of `row_statistics`, which has checked the arguments."""
    count, columns = logits_CV.shape
    stats_3C = torch.empty(3, count, dtype=torch.float32, device=logits_CV.device)
    block = min(ROW_BLOCK, max(16, triton.next_power_of_2(columns)))
    cross_entropy_statistics_kernel[(count,)](logits_CV, labels_C.contiguous(), stats_3C, count, columns,
                                 BLOCK=block, num_warps=ROW_WARPS)  # fmt: skip
    return stats_3C


def triton_logits_to_gradient_(
    logits_CV: Tensor, labels_C: Tensor, top_C: Tensor, sum_C: Tensor, at_label_C: Tensor
) -> Tensor:
    """Gradients in place of logits: the backend "triton" of `logits_to_gradient_`, which has checked the arguments."""
    count, columns = logits_CV.shape
    block = min(BLOCK, max(16, triton.next_power_of_2(columns)))
    cross_entropy_gradient_kernel[(count, triton.cdiv(columns, block))](
        logits_CV, labels_C.contiguous(), top_C.contiguous(), sum_C.contiguous(), at_label_C.contiguous(), columns,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return logits_CV

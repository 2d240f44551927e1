"""The public function of largest logits: checks and dispatch.

Legend: N rows, V columns of the vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.largest.checks import check_arguments
from mmkernels.largest.naive import naive_largest_logits


def largest_logits(logits_NV: Tensor, known: int, *, backend: str = "auto") -> Tensor:
    """Find the largest of each row's first columns, of equal ones the first, and whether all of the row are finite.

    The host waits for nothing.

    Args:
        logits_NV: bfloat16, float16 or float32 (float64 too without the kernel), at least one row and one column; rows
            may lie at any distance, columns must be contiguous.
        known: columns that may be found, the first ones; more than V are all. A NaN among them is larger than any
            number, as for `torch.argmax`.
        backend: "auto" (the kernels on CUDA, else "naive"), "triton" or "naive" (torch).

    Returns:
        int64 [2, N]: the column that was found, and 1 where all V of the row are finite, else 0.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(logits_NV, known)
    known = min(known, logits_NV.shape[1])
    if use_triton(backend, "logits_NV", logits_NV, others=("naive",)):
        from mmkernels.largest.launch import triton_largest_logits  # only this path needs Triton

        return triton_largest_logits(logits_NV, known)
    return naive_largest_logits(logits_NV, known)

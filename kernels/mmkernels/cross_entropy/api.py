"""The public functions of cross-entropy: checks and dispatch.

Legend: C tokens, V columns of the vocabulary (all, or those of one tensor-parallel rank).
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.cross_entropy.checks import check_logits, check_statistics
from mmkernels.cross_entropy.naive import naive_logits_to_gradient_, naive_row_statistics

OTHERS = ("naive",)


def row_statistics(logits_CV: Tensor, labels_C: Tensor, *, backend: str = "auto") -> Tensor:
    """Statistics of each row that its softmax and loss need, and that ranks with other columns have to know.

    Args:
        logits_CV: bfloat16, float16 or float32 (float64 too without the kernel), contiguous; V may be 0.
        labels_C: int64, columns of this tensor; one outside of [0, V) is no column here.
        backend: "auto" (the kernel on CUDA, else "naive"), "triton" or "naive" (torch, with temporaries of [C, V]).

    Returns:
        fp32 (float64 for float64) [3, C]: the largest logit (-inf without columns), the sum of
        ``exp(logit - largest)``, and the label's logit, 0 where it is no column here.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_logits(logits_CV, labels_C)
    if use_triton(backend, "logits_CV", logits_CV, others=OTHERS) and logits_CV.numel():
        from mmkernels.cross_entropy.launch import triton_row_statistics

        return triton_row_statistics(logits_CV, labels_C)
    return naive_row_statistics(logits_CV, labels_C)


def logits_to_gradient_(
    logits_CV: Tensor, labels_C: Tensor, top_C: Tensor, sum_C: Tensor, at_label_C: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Overwrite logits by ``softmax - onehot``, the gradient of each row's cross-entropy.

    Args:
        logits_CV: as for :func:`row_statistics`; holds ``exp(logit - top) / sum`` afterwards, rounded once.
        labels_C: as for :func:`row_statistics`.
        top_C: the largest logit over the columns of all ranks, in the statistics' dtype.
        sum_C: the sum of ``exp(logit - top)`` over the same columns, in the same dtype.
        at_label_C: the value for the label's column: ``expm1`` of its log-probability, which has digits left
            where a rounded probability minus 1 has none.
        backend: as for :func:`row_statistics`.

    Returns:
        `logits_CV` itself.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_logits(logits_CV, labels_C)
    check_statistics(logits_CV, top_C=top_C, sum_C=sum_C, at_label_C=at_label_C)
    if use_triton(backend, "logits_CV", logits_CV, others=OTHERS) and logits_CV.numel():
        from mmkernels.cross_entropy.launch import triton_logits_to_gradient_

        return triton_logits_to_gradient_(logits_CV, labels_C, top_C, sum_C, at_label_C)
    return naive_logits_to_gradient_(logits_CV, labels_C, top_C, sum_C, at_label_C)


def has_kernel(x: Tensor) -> bool:
    """Whether `backend="auto"` runs the kernels on tensors like this, so that nothing else of its size is needed."""
    return use_triton("auto", "x", x)

"""The definitions, in plain torch: what the kernels are tested against, and the path without them.

Legend: C tokens, V columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_row_statistics(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Statistics of each row, [3, C], as `mmkernels.cross_entropy.row_statistics`."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if not wide_CV.shape[1]:
        return torch.stack([torch.full_like(labels_C, value, dtype=wide_CV.dtype) for value in (-torch.inf, 0, 0)])
    top_C = wide_CV.amax(1)
    sum_C = (wide_CV - top_C[:, None]).exp().sum(1)
    own_C, local_C = _own(labels_C, logits_CV.shape[1])
    label_C = torch.where(own_C, wide_CV.gather(1, local_C[:, None])[:, 0], 0)
    return torch.stack([top_C, sum_C, label_C])


def naive_logits_to_gradient_(
    logits_CV: Tensor, labels_C: Tensor, top_C: Tensor, sum_C: Tensor, at_label_C: Tensor
) -> Tensor:
    """Gradients in place of logits, as `mmkernels.cross_entropy.logits_to_gradient_`."""
    if not logits_CV.shape[1]:
        return logits_CV
    own_C, local_C = _own(labels_C, logits_CV.shape[1])
    grad_CV = (logits_CV - top_C[:, None]).exp() / sum_C[:, None]
    column_C1 = local_C[:, None]
    grad_CV.scatter_(1, column_C1, torch.where(own_C[:, None], at_label_C[:, None], grad_CV.gather(1, column_C1)))
    return logits_CV.copy_(grad_CV)


def _own(labels_C: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a label is one of the columns, and the label, or 0."""
    own_C = (labels_C >= 0) & (labels_C < columns)
    return own_C, torch.where(own_C, labels_C, 0)

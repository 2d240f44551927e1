"""The definition, in plain torch: what the kernels are tested against, and the path without them.

Legend: N rows, V columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_largest_logits(logits_NV: Tensor, known: int) -> Tensor:
    """Columns and whether rows are finite, int64 [2, N], as `mmkernels.largest.largest_logits`."""
    extremes = torch.stack(logits_NV.aminmax(dim=1))  # a NaN anywhere is in both
    return torch.stack([logits_NV[:, :known].argmax(1), torch.isfinite(extremes).all(0).long()])

"""Triton kernels of cross-entropy: one pass over a row for its statistics, one for the gradient, in fp32, rounded once.

Legend: C tokens, V columns of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_statistics_kernel(logits_ptr, labels_ptr, stats_ptr, C, V, BLOCK: tl.constexpr) -> None:
    """Largest logit, sum of exp(logit - largest) and the label's logit of a row. Grid: C."""
    c = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + c * V
    columns = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, tl.max(x))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # columns of -inf alone so far: exp(-inf - 0) is 0
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift))
        top = larger
    label = tl.load(labels_ptr + c)
    own = (label >= 0) & (label < V)
    label_logit = tl.load(row_ptr + tl.where(own, label, 0)).to(tl.float32)
    tl.store(stats_ptr + c, top)
    tl.store(stats_ptr + C + c, total)
    tl.store(stats_ptr + 2 * C + c, tl.where(own, label_logit, 0.0))


@triton.jit
def cross_entropy_gradient_kernel(
    logits_ptr, labels_ptr, top_ptr, sum_ptr, at_label_ptr, V, BLOCK: tl.constexpr
) -> None:
    """Logits <- exp(logit - top) / sum, and at_label in the label's column. Grid: C, ceil(V / BLOCK)."""
    c = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_ptr = logits_ptr + c * V + columns
    x = tl.load(at_ptr, mask=columns < V, other=0.0).to(tl.float32)
    gradient = tl.exp(x - tl.load(top_ptr + c)) * (1.0 / tl.load(sum_ptr + c))
    gradient = tl.where(columns == tl.load(labels_ptr + c), tl.load(at_label_ptr + c), gradient)
    tl.store(at_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=columns < V)

"""Softmax statistics of rows of logits, and the gradient of their cross-entropy in place. See README.md here."""

from mmkernels.cross_entropy.api import has_kernel, logits_to_gradient_, row_statistics

__all__ = ["has_kernel", "logits_to_gradient_", "row_statistics"]

"""The largest logit of each row, and whether all of a row are finite. See README.md here."""

from mmkernels.largest.api import largest_logits

__all__ = ["largest_logits"]

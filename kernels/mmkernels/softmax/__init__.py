"""Causal softmax attention of packed rows, and of one block for a ring of ranks. See README.md beside this file."""

from mmkernels.softmax.api import (
    softmax_attention,
    softmax_attention_with_lse,
    softmax_backward,
    softmax_forward,
    softmax_merge,
    softmax_packed_backward,
    softmax_pieces,
)
from mmkernels.softmax.backends.cudnn_plans import build_plans
from mmkernels.softmax.dispatch import Piece
from mmkernels.softmax.paged import softmax_paged_step
from mmkernels.softmax.suffixes import Suffixes, softmax_suffix_backward, softmax_suffix_forward

__all__ = [
    "Piece",
    "Suffixes",
    "build_plans",
    "softmax_attention",
    "softmax_attention_with_lse",
    "softmax_backward",
    "softmax_forward",
    "softmax_merge",
    "softmax_packed_backward",
    "softmax_paged_step",
    "softmax_pieces",
    "softmax_suffix_backward",
    "softmax_suffix_forward",
]

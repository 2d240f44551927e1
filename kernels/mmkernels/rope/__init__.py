"""Rotary position embedding of the first dimensions of each head. See README.md beside this file."""

from mmkernels.rope.api import partial_rope

__all__ = ["partial_rope"]

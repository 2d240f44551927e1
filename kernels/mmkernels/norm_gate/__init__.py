"""RMSNorm over all heads times a sigmoid gate: the tail of a lightning layer. See README.md beside this file."""

from mmkernels.norm_gate.api import norm_gate

__all__ = ["norm_gate"]

"""RMSNorm, alone and fused with the residual sum before it. See README.md beside this file."""

from mmkernels.norm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]

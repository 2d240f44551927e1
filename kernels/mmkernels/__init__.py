"""Kernels of mmtrain. They need torch and, on GPUs, triton; they can be used without mmtrain. Each folder is one op."""

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning import (
    lightning_attention,
    lightning_decode_step,
    lightning_segment_states,
    silu_lightning_attention,
)

__all__ = [
    "KernelArgumentError",
    "lightning_attention",
    "lightning_decode_step",
    "lightning_segment_states",
    "silu_lightning_attention",
]

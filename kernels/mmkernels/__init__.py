"""Kernels of mmtrain. They need torch alone and can be used without mmtrain."""

from mmkernels.errors import KernelArgumentError
from mmkernels.lightning import lightning_attention, lightning_decode_step

__all__ = ["KernelArgumentError", "lightning_attention", "lightning_decode_step"]

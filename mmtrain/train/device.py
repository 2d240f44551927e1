"""Precision that a device computes in, and its peak rate."""

from __future__ import annotations

import ctypes
import sys

import torch

from mmtrain.health.product_time import product_seconds
from mmtrain.model.flops import peak_flops


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the products: as asked, or by `auto` bf16 where the device multiplies it natively."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has bf16 dot products (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def keep_freed_memory() -> bool:
    """Let the C library keep what a CPU run frees; returns whether it took the setting (glibc does).

    By default glibc hands tensors of megabytes back to the kernel as soon as they are freed, and each step pays for the
    page faults of getting them again: on 2 cores a step of a small model in bf16 takes 15% longer for it.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = ((mmap_threshold, 32 << 20), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))
    return all([mallopt(name, value) == 1 for name, value in settings])


def give_back_memory(device: torch.device) -> float:
    """Give back what torch keeps of freed memory, on the device and pinned on the host.

    Parameters for an optimizer on the host, and block inputs there, are pinned: without this, those of the next layout,
    of other sizes, would come on top of them.

    Returns:
        GiB that tensors of the device still hold.
    """
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)  # blocks that a copy still reads would be kept
    torch.cuda.empty_cache()
    # The public name came after torch 2.11.
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
    empty_host_cache()
    return torch.cuda.memory_allocated(device) / 2**30


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is relative to: the data sheet's for a known GPU, else a large product measured now."""
    if device.type == "cuda":
        known = peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
        if known is not None:
            return known
    return product_rate(device, dtype)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random numbers, measured now; a GPU's clock follows what it multiplies."""
    size = 8192 if device.type == "cuda" else 1024
    return 2.0 * size**3 / product_seconds(device, dtype, size, repeats=20)

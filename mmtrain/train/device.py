"""What a device computes in, and how fast it can."""

from __future__ import annotations

import time

import torch

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


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is relative to: the data sheet's for a known GPU, else a large product measured now."""
    if device.type == "cuda":
        known = peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
        if known is not None:
            return known
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):  # the best of many: other processes of the run measure at the same time
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best

"""Memory of a device: what is free, whether a model's weights fit, and whether an error says that it is full."""

from __future__ import annotations

import os

import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.parallel.dtensor_params import local_tensor
from mmtrain.parallel.memory.system import meminfo_bytes

_GIB = 1 << 30


def check_room(model: nn.Module, device: torch.device, ranks: int = 1, beside: int = 0) -> None:
    """Refuse a model whose weights do not fit into what is free on the device.

    Args:
        model: on the meta device; of a parameter that is split the part of this process counts.
        device: CPU or GPU. Nothing is checked where the system does not say what is free.
        ranks: processes of this host, each with its own part.
        beside: bytes that loading takes there beside the weights.

    Raises:
        ConfigError: they do not fit.
    """
    needed = weight_bytes(model) + beside
    free = free_for_rank(device, ranks)
    if free is not None and needed > free:
        raise ConfigError("--device", device, f"has {free / _GIB:.1f} GiB of memory free, the weights take "
                          f"{needed / _GIB:.1f} GiB", "give a device with more")  # fmt: skip


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, of split ones of the part here; the meta device will do."""
    return sum(part.numel() * part.element_size() for part in map(local_tensor, model.state_dict().values()))


def free_for_rank(device: torch.device, ranks: int) -> int | None:
    """Return the bytes that one of a host's processes may allocate: all of its own GPU's, a share of the CPU's."""
    free = free_bytes(device)
    return free // ranks if free is not None and device.type == "cpu" else free


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (found := meminfo_bytes("MemAvailable")) is not None:
        return found
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a device's or the system's lack of memory from other errors."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)

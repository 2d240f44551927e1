"""Memory of a GPU that torch's allocator does not know of, for a copy that lives for a few steps.

Torch's own would count it into the peak of the steps, and keep it when it is given back.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch
from torch import Tensor

LEFT_FREE = 16
"""A part in so many of a device's memory is not taken: a later step may need more than those before it did."""


class DeviceMemory:
    """Bytes of a GPU's free memory, as one tensor.

    Attributes:
        bytes_N: uint8, on the device.

    Args:
        device: of the process.
        size: in bytes.

    Raises:
        MemoryError: the driver does not give as much.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device, self._pointer = device, ctypes.c_uint64()
        with torch.cuda.device(device):
            if _driver().cuMemAlloc_v2(ctypes.byref(self._pointer), ctypes.c_size_t(size)):
                raise MemoryError(f"{size} bytes of {device}")
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "version": 3,
                                         "data": (self._pointer.value, False)}  # fmt: skip
        self.bytes_N: Tensor = torch.as_tensor(self, device=device)

    def free(self) -> None:
        """Give it back; nothing on the device uses it any more, and no view of it is left."""
        del self.bytes_N
        with torch.cuda.device(self._device):  # the thread may be another than the one that took it
            _driver().cuMemFree_v2(self._pointer)


def free_bytes(device: torch.device) -> int:
    """Return how much of a GPU may be taken for a while: what nobody holds, but for a part that stays free."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - total // LEFT_FREE)


def take(device: torch.device, size: int) -> DeviceMemory | None:
    """Take memory if the driver gives it."""
    with suppress(MemoryError, OSError):
        return DeviceMemory(device, size)
    return None


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

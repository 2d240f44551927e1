"""Memory of one process that others of its host map: CUDA's inter-process memory, or a file that all map."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor


class IpcMemory(Protocol):
    """Memory of this process that others can map, and the way to map theirs.

    Attributes:
        own: this process's memory, zeros, uint8; there once it was exported.
    """

    own: Tensor

    def export(self) -> Any:
        """Handle by which other processes open this memory; can be pickled."""

    def open(self, handle: Any) -> Tensor:
        """Map another process's memory, by its handle. It is unmapped when the tensor goes.

        Raises:
            RuntimeError, OSError: it cannot be reached from here.
        """

    def unlink(self) -> None:
        """Give up the handle: everyone who will open it has done so."""


def allocate_ipc_memory(size: int, device: torch.device) -> IpcMemory:
    """Allocate `size` bytes of a GPU or of the host."""
    return GpuIpcMemory(size, device) if device.type == "cuda" else HostIpcMemory(size)


class GpuIpcMemory:
    """Memory of this GPU, exported by CUDA's handles for other processes."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device, self.own = device, torch.zeros(size, dtype=torch.uint8, device=device)
        self._counter: tuple[bytes, int] | None = None

    def export(self) -> tuple[Any, ...]:
        """Handle as torch's own processes would pass it on."""
        torch.cuda.synchronize(self.device)  # zeros are there before anyone reads them
        rebuild, handle = reduce_tensor(self.own)
        self._counter = handle[_COUNTER], handle[_COUNTER + 1]
        return rebuild, *handle

    def open(self, exported: tuple[Any, ...]) -> Tensor:
        """Map the exporter's memory for this GPU: a tensor that says it lies here."""
        rebuild, *handle = exported
        theirs, mine = handle[_DEVICE], self.device.index
        hidden = theirs == mine or theirs >= torch.cuda.device_count()  # from this process, or the same GPU
        if not hidden and not torch.cuda.can_device_access_peer(mine, theirs):
            raise RuntimeError(f"GPU {mine} cannot read the memory of GPU {theirs}")
        # Its own count of readers would be one more each time: there is none here, see unlink.
        handle[_DEVICE], handle[_COUNTER] = mine, handle[_COUNTER] + b"-none"
        return rebuild(*handle)

    def unlink(self) -> None:
        """Count the memory as read by all: else torch keeps it, and warns of memory in use, should this process end.

        The exporter does it, once: torch counts one reader, below zero the count is a large number, and then the memory
        would never be given back (seen with three readers, not with one).
        """
        if self._counter is not None:
            torch.UntypedStorage._release_ipc_counter(*self._counter, device=self.device.index)
            self._counter = None


class HostIpcMemory:
    """Memory of the host, exported as a file whose name goes once all have mapped it."""

    def __init__(self, size: int) -> None:
        descriptor, path = tempfile.mkstemp(prefix="mmtrain-")
        os.close(descriptor)
        self.size, self.path = size, Path(path)

    def export(self) -> str:
        """Path of the file."""
        self.own = self.open(str(self.path))  # makes the file as long as it has to be
        return str(self.path)

    def open(self, path: str) -> Tensor:
        """Map the file of another process."""
        return torch.from_file(path, shared=True, size=self.size, dtype=torch.uint8)

    def unlink(self) -> None:
        """Remove the file's name; whoever has mapped it keeps the memory."""
        self.path.unlink()


_DEVICE, _COUNTER = 6, 11
"""Where `reduce_tensor` says on which GPU the memory is, and which file, at which place, counts its readers."""

"""Memory of one process that others of its host read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor


class Loan(Protocol):
    """Memory of this process, and the way to that of others.

    Attributes:
        own: zeros, uint8; there once it has a handle.
    """

    own: Tensor

    def handle(self) -> Any:
        """What others need to borrow it; can be pickled."""

    def borrow(self, handle: Any) -> Tensor:
        """Another process's memory, by its handle.

        Raises:
            RuntimeError, OSError: it cannot be reached from here.
        """

    def close(self) -> None:
        """Nobody will use the handle any more."""


def lend(size: int, device: torch.device) -> Loan:
    """So many bytes of a GPU or of the host."""
    return GpuLoan(size, device) if device.type == "cuda" else HostLoan(size)


class GpuLoan:
    """Memory of this GPU, lent by CUDA's handles for other processes."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device, self.own = device, torch.zeros(size, dtype=torch.uint8, device=device)

    def handle(self) -> tuple[Any, ...]:
        """See :class:`Loan`: what torch's own processes would pass on."""
        torch.cuda.synchronize(self.device)  # zeros are there before anyone reads them
        rebuild, handle = reduce_tensor(self.own)
        return rebuild, *handle

    def borrow(self, lent: tuple[Any, ...]) -> Tensor:
        """The lender's memory, mapped for this GPU: tensors that say they lie here."""
        rebuild, *handle = lent
        theirs, mine = handle[_DEVICE], self.device.index
        hidden = theirs == mine or theirs >= torch.cuda.device_count()  # from this process, or the same GPU
        if not hidden and not torch.cuda.can_device_access_peer(mine, theirs):
            raise RuntimeError(f"GPU {mine} cannot read the memory of GPU {theirs}")
        # Desks of all ranks go together, so this one is counted as done with it now, and not when its tensor goes: the
        # lender would warn of memory in use, should it end first.
        counter = handle[_COUNTER], handle[_COUNTER + 1]
        handle[_DEVICE], handle[_COUNTER] = mine, handle[_COUNTER] + b"-none"
        part = rebuild(*handle)
        torch.UntypedStorage._release_ipc_counter(*counter, device=mine)
        return part

    def close(self) -> None:
        """The memory goes with the tensors."""


class HostLoan:
    """Memory of the host, lent as a file that is gone once all have it open."""

    def __init__(self, size: int) -> None:
        descriptor, path = tempfile.mkstemp(prefix="mmtrain-")
        os.close(descriptor)
        self.size, self.path = size, Path(path)

    def handle(self) -> str:
        """See :class:`Loan`: a path."""
        self.own = self.borrow(str(self.path))  # makes the file as long as it has to be
        return str(self.path)

    def borrow(self, path: str) -> Tensor:
        """See :class:`Loan`."""
        return torch.from_file(path, shared=True, size=self.size, dtype=torch.uint8)

    def close(self) -> None:
        """See :class:`Loan`; who has the file open keeps the memory."""
        self.path.unlink()


_DEVICE, _COUNTER = 6, 11
"""Where `reduce_tensor` says on which GPU the memory is, and which file, at which place, counts its readers."""

"""The peak of a process's tensors, counted as they are made and freed: what `max_memory_allocated` is on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StoragePeak(TorchDispatchMode):
    """Sums the bytes of all storages that operations return while the mode is on, and keeps the largest sum.

    Attributes:
        live: bytes at the moment.
        peak: most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, *tensors: torch.Tensor) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs, out)):  # arguments too: FSDP gives storages their size in place
            if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        if self.live > self.peak:  # FSDP takes memory from storages in place, which no operation tells
            for other, reference in self._storages.items():
                if (held := reference()) is not None:
                    self.live += held.nbytes() - self._sizes[other]
                    self._sizes[other] = held.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self._storages.pop(key, None)
        self.live -= self._sizes.pop(key, 0)

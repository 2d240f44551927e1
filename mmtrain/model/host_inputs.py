"""Inputs of blocks that wait for backward in host memory: copied out while forward goes on, and back one block ahead.

On a CPU they are copied to other memory, so that the same code runs there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class HostCopy:
    """A tensor in host memory, and where it came from.

    Attributes:
        host: the copy, pinned where a GPU reads it.
        device: of the tensor.
        before: the copy that was made before, whose tensor backward asks for next.
        returned: the tensor on its way back, and the event after which it is there.
    """

    host: Tensor
    device: torch.device
    before: HostCopy | None
    returned: tuple[Tensor, torch.cuda.Event | None] | None = None


class HostInputs:
    """Sends what is saved inside of :meth:`hold` to host memory; one for all blocks, which share a stream."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._newest: HostCopy | None = None

    def hold(self) -> saved_tensors_hooks:
        """Context in which tensors that autograd saves go to host memory."""
        return saved_tensors_hooks(self._send, self._fetch)

    def _send(self, tensor: Tensor) -> HostCopy:
        if tensor.device.type != "cuda":
            copy = HostCopy(tensor.detach().clone(), tensor.device, self._newest)
        else:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream = self._ready_stream(tensor.device)
            with torch.cuda.stream(stream):
                host.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(stream)  # its memory is not taken before the copy is done
            copy = HostCopy(host, tensor.device, self._newest)
        self._newest = copy
        return copy

    def _fetch(self, copy: HostCopy) -> Tensor:
        """Give the tensor back, and let the one before set out."""
        self._start(copy)
        tensor, arrived = copy.returned
        copy.returned = None
        if arrived is not None:
            torch.cuda.current_stream(copy.device).wait_event(arrived)
        if self._newest is copy:
            self._newest = copy.before
        before, copy.before = copy.before, None  # or all copies of a run would hang together
        if before is not None:
            self._start(before)
        return tensor

    def _start(self, copy: HostCopy) -> None:
        if copy.returned is not None:
            return
        if copy.device.type != "cuda":
            copy.returned = copy.host.clone(), None
            return
        tensor = torch.empty_like(copy.host, device=copy.device)  # of the computing stream, which frees it
        stream = self._ready_stream(copy.device)
        with torch.cuda.stream(stream):
            tensor.copy_(copy.host, non_blocking=True)
            arrived = stream.record_event()
        copy.returned = tensor, arrived

    def _ready_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of copies, behind all that was computed so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream

"""Passes of fixed shapes over memory that stays where it is: CUDA graphs on a GPU; on a CPU they are just run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Shape, Output = TypeVar("Shape", bound=Hashable), TypeVar("Output")


class GraphStore(Generic[Shape, Output]):
    """Graphs by the shapes of their passes, recorded as these are first met."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[Shape, tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, shape: Shape, forward: Callable[[], Output]) -> Output:
        """Run a pass on the current stream; its output is overwritten by the next of its shape.

        The first of a shape runs kernel by kernel, which compiles kernels and chooses among them, and then is recorded:
        that does nothing to any memory.
        """
        if shape in self._recorded:
            graph, output = self._recorded[shape]
            graph.replay()
            return output
        output = forward()
        if self._pool is not None:
            stream = torch.cuda.current_stream(self._device)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                self._recorded[shape] = graph, forward()
        return output

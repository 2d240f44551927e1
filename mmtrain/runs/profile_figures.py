"""Figures that a profile needs beside the device's times: operations, memory and versions.

Legend: L layers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmdata.rows.loader import PackedBatch
from mmtrain.config import ModelConfig
from mmtrain.log.kernel_times import PRODUCTS
from mmtrain.model.flops import step_flops
from mmtrain.model.mixers.registry import MIXERS
from mmtrain.parallel.dtensor_params import local_tensor
from mmtrain.parallel.layout import Layout
from mmtrain.train.batches import BatchReader
from mmtrain.train.curriculum import RunStep
from mmtrain.train.session import Session
from mmtrain.train.step import model_inputs

GIB = 2**30


class KeepingReader:
    """Reader of a run's rows that keeps those of the last step.

    Attributes:
        batches: micro-batches that the last step got.
    """

    def __init__(self, reader: BatchReader) -> None:
        self._reader = reader
        self.batches: list[PackedBatch] = []

    def read(self, step: RunStep) -> list[PackedBatch]:
        """Return this rank's micro-batches of a step."""
        self.batches = self._reader.read(step)
        return self.batches

    def close(self) -> None:
        """End the processes that read ahead."""
        self._reader.close()


def document_lengths(batches: Sequence[PackedBatch]) -> list[int]:
    """Return the tokens of every document in some micro-batches, without padding."""
    host = torch.device("cpu")
    return [n for batch in batches for n in model_inputs(batch, 1e4, host).packing.real_lengths]


def operations(
    model: ModelConfig, lengths: Sequence[int], drop_rate_L: Sequence[float], layout: Layout
) -> dict[str, float]:
    """Return the useful operations of a step on one rank, forward and backward, by kind of kernel.

    Ranks that share rows, or hold parts of the model, are taken to share the work evenly. The router's logits are a
    kernel of their own kind, and 0.1% of the work: they are left out.

    Args:
        model: the architecture.
        lengths: tokens of every document in the rank's micro-batches.
        drop_rate_L: share of the assignments dropped, a layer; empty without experts.
        layout: of all ranks.
    """
    kept = sum(lengths) * model.top_k * sum(1.0 - rate for rate in drop_rate_L) if drop_rate_L else None
    forward = dict(step_flops(model, lengths, kept).by_part)
    del forward["router"]
    found = {f"{mixer.name} attention": forward.pop(f"{mixer.name}_attention") for mixer in MIXERS.values()}
    found[PRODUCTS] = sum(forward.values())
    ranks = layout.tp * layout.cp * layout.pp
    return {kind: 3 * count / ranks for kind, count in found.items()}  # backward is two products of forward's size


class HeldMemory:
    """Memory of parameters, gradients and moments on one rank, as tensors hold it; gradients as an update finds them.

    Args:
        session: at work; its next update is looked at, and :meth:`close` ends that.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._gradients = session, 0
        self._hook = session.optimizer.register_step_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        self._gradients = _bytes(p.grad for p in self._session.model.module.parameters() if p.grad is not None)

    def close(self) -> None:
        """Look no more."""
        self._hook.remove()

    def gib(self) -> dict[str, float]:
        """Return GiB by kind; on a GPU the rest of the peak, the peak, graphs included, and what torch reserved."""
        device, optimizer = self._session.context.device, self._session.optimizer
        states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        found = {
            "parameters": _bytes(self._session.model.module.parameters()),
            "gradients": self._gradients,
            "optimizer": _bytes(states),
        }
        if device.type == "cuda":
            peak, reserved = self._session.model.peak_bytes(), torch.cuda.max_memory_reserved(device)
            here = next(self._session.model.module.parameters()).device == device  # all three are on the host otherwise
            found["the rest"] = peak - (sum(found.values()) if here else 0)
            found |= {"peak allocated": peak, "peak reserved": reserved}
        return {kind: count / GIB for kind, count in found.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's part of some tensors."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of what computes, by name."""
    found = {"torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # there is none but for Linux on x86
        found["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found

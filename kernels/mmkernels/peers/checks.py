"""Argument checks of reading other GPUs' memory. They run before any work and read no values from a device.

Legend: W ranks, S rows of one rank for another, M = W * S received rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_kind
from mmkernels.common.errors import KernelArgumentError
from mmkernels.peers.memory import PeerMemory


def check_take(memory: PeerMemory, out_MD: Tensor, source_M: Tensor | None, used_M: Tensor | None) -> None:
    """Refuse memory, rows and numbers of rows that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    check_kind("out_MD", out_MD, 2, ALL_DTYPES)
    name, index_M = ("used_M", used_M) if source_M is None else ("source_M", source_M)
    _check_index(memory, out_MD, name, index_M)
    if source_M is not None and used_M is not None:
        raise KernelArgumentError("used_M", "a tensor", "None, if source_M is given")


def check_meet(memory: PeerMemory) -> None:
    """Refuse memory too small for a number of every rank; errors as above."""
    have = memory.parts[memory.rank].numel()
    if have < 8 * len(memory.parts):
        raise KernelArgumentError("memory", f"parts of {have} bytes", "8 bytes a rank, or more")


def _check_index(memory: PeerMemory, out_MD: Tensor, name: str, index_M: object) -> None:
    rows, ranks = out_MD.shape[0], len(memory.parts)
    if not isinstance(index_M, Tensor) or index_M.dtype != torch.int32 or index_M.shape != (rows,):
        got = f"{index_M.dtype} {list(index_M.shape)}" if isinstance(index_M, Tensor) else type(index_M).__name__
        raise KernelArgumentError(name, got, f"an int32 tensor, one a row of out_MD: [{rows}]")
    if rows % ranks or not out_MD.is_contiguous():
        raise KernelArgumentError("out_MD", f"shape {list(out_MD.shape)}, strides {list(out_MD.stride())}",
                                  f"contiguous, as many rows for each of {ranks} ranks")  # fmt: skip
    if memory.parts[memory.rank].numel() < out_MD.nbytes:
        have = memory.parts[memory.rank].numel()
        raise KernelArgumentError("memory", f"parts of {have} bytes", f"{out_MD.nbytes}, those of out_MD, or more")
    for what, x in (("memory", memory.address_W), (name, index_M)):
        if x.device != out_MD.device:
            raise KernelArgumentError(what, f"device {x.device}", f"the device of out_MD, {out_MD.device}")

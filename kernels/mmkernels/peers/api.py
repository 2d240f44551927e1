"""The public functions: checks and dispatch.

Legend: W ranks, S rows of one rank for another, M = W * S rows that arrive, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmkernels.common.checks import ALL_DTYPES, check_kind, use_triton
from mmkernels.common.errors import KernelArgumentError


@dataclass(frozen=True)
class PeerMemory:
    """Memory of all ranks of a host, as one of them reaches it.

    Attributes:
        parts: of each rank, uint8, of the same size and aligned to 16 bytes; how they were mapped is the caller's work.
        rank: whose part this process owns.
        address_W: where they begin, int64, on the device that is to read them.
    """

    parts: Sequence[Tensor]
    rank: int
    address_W: Tensor = field(init=False)

    def __post_init__(self) -> None:
        addresses = torch.tensor([part.data_ptr() for part in self.parts], device=self.parts[self.rank].device)
        object.__setattr__(self, "address_W", addresses)

    def rows(self, rank: int, number: int, width: int, dtype: torch.dtype) -> Tensor:
        """The first rows of a rank's part, [number, width]."""
        return self.parts[rank][: number * width * dtype.itemsize].view(dtype).view(number, width)


def take_from_peers(
    memory: PeerMemory,
    out_MD: Tensor,
    *,
    source_M: Tensor | None = None,
    used_M: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Read what an all-to-all of equal parts would bring, in any order, and no more of it than is wanted.

    Each rank has M rows in its memory, S of them for each rank, in their order. Row m of the arrivals is then the row
    ``rank * S + m % S`` of the rank ``m // S``.

    Args:
        memory: whose rows lie at the beginning. Nobody may write them meanwhile: see :func:`meet`.
        out_MD: where to; bfloat16, float16 or float32 (float64 too without the kernel). Rows that nobody wants stay
            unwritten.
        source_M: int32, the arrival that comes to each row of out; -1 for none. Give this or the next.
        used_M: int32, negative for rows of out to leave alone; any other gets the arrival of its own number.
        backend: "auto" (the kernel on CUDA, else torch), "triton" or "naive".

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_kind("out_MD", out_MD, 2, ALL_DTYPES)
    name, index_M = ("used_M", used_M) if source_M is None else ("source_M", source_M)
    _check(memory, out_MD, name, index_M)
    if source_M is not None and used_M is not None:
        raise KernelArgumentError("used_M", "a tensor", "None, if source_M is given")
    if not use_triton(backend, "out_MD", out_MD, others=("naive",)):
        return _naive_take(memory, out_MD, source_M, used_M)
    from mmkernels.peers.kernels import triton_take

    return triton_take(memory, out_MD, index_M, numbered=source_M is None)


def meet(memory: PeerMemory, number: int) -> None:
    """Let the device go on when all ranks' devices have come here: what they wrote before can be read from then on.

    Args:
        memory: of int64 numbers, one a rank, 0 at first, and not used for anything else.
        number: of the meeting, from 1 on, counted alike by all ranks.

    Raises:
        KernelArgumentError: the memory is not on a GPU (nor, under the interpreter, on the CPU).
    """
    own = memory.parts[memory.rank]
    if own.numel() < 8 * len(memory.parts):
        raise KernelArgumentError("memory", f"parts of {own.numel()} bytes", "8 bytes a rank, or more")
    from mmkernels.common.triton_support import check_device
    from mmkernels.peers.kernels import triton_meet

    check_device("memory", own)
    triton_meet(memory, number)


def _check(memory: PeerMemory, out_MD: Tensor, name: str, index_M: object) -> None:
    """Refuse what does not fit together; reads no values from a device."""
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


def _naive_take(memory: PeerMemory, out_MD: Tensor, source_M: Tensor | None, used_M: Tensor | None) -> None:
    rows, width = out_MD.shape
    share = rows // len(memory.parts)
    mine = slice(memory.rank * share, (memory.rank + 1) * share)
    theirs = [memory.rows(rank, rows, width, out_MD.dtype)[mine] for rank in range(len(memory.parts))]
    index_M = used_M if source_M is None else source_M
    wanted_N = (index_M >= 0).nonzero().flatten()
    number_N = wanted_N if source_M is None else source_M[wanted_N].long()
    out_MD[wanted_N] = torch.cat(theirs)[number_N]

"""The public functions of reading other GPUs' memory: checks and dispatch.

Legend: W ranks, S rows of one rank for another, M = W * S received rows, D columns.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.peers.checks import check_meet, check_take
from mmkernels.peers.memory import PeerMemory
from mmkernels.peers.naive import naive_take_from_peers


def take_from_peers(
    memory: PeerMemory,
    out_MD: Tensor,
    *,
    source_M: Tensor | None = None,
    used_M: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Read rows that an all-to-all of equal parts would bring, in any order, and no more of them than are used.

    Each rank has M rows in its memory, S of them for each rank, in their order. The received row m is then the row
    ``rank * S + m % S`` of the rank ``m // S``.

    Args:
        memory: whose rows lie at the beginning. Nobody may write them meanwhile: see :func:`meet`.
        out_MD: where to; bfloat16, float16 or float32 (float64 too without the kernel). Rows without a
            received row stay unwritten.
        source_M: int32, the received row that comes to each row of out; -1 for none. Give this or the next.
        used_M: int32, negative for rows of out to leave alone; any other gets the received row of its own number.
        backend: "auto" (the kernel on CUDA, else torch), "triton" or "naive".

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_take(memory, out_MD, source_M, used_M)
    if not use_triton(backend, "out_MD", out_MD, others=("naive",)):
        return naive_take_from_peers(memory, out_MD, source_M, used_M)
    from mmkernels.peers.launch import triton_take

    return triton_take(memory, out_MD, used_M if source_M is None else source_M, numbered=source_M is None)


def meet(memory: PeerMemory, number: int) -> None:
    """Let the device go on when all ranks' devices have come here: what they wrote before can be read from then on.

    Args:
        memory: of int64 numbers, one a rank, 0 at first, and not used for anything else.
        number: of the meeting, from 1 on, counted alike by all ranks.

    Raises:
        KernelArgumentError: the memory is not on a GPU (nor, under the interpreter, on the CPU).
    """
    check_meet(memory)
    from mmkernels.common.triton_support import check_device
    from mmkernels.peers.launch import triton_meet

    check_device("memory", memory.parts[memory.rank])
    triton_meet(memory, number)

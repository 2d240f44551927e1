"""Numbers that CUDA streams write and wait for: streams of several GPUs meet without a kernel.

A kernel that waits holds a multiprocessor, and one that all are busy with other work cannot begin. The driver's own
operations on streams need none (CUDA driver API, Stream Memory Operations).
"""

from __future__ import annotations

import ctypes

import torch

BYTES = 4
"""Size of a number."""
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, modulo 2^32


def write_number(stream: torch.cuda.Stream, address: int, number: int) -> None:
    """Write a number when a stream gets there; what it did before can be read by whoever finds the number.

    Args:
        stream: of this process' GPU.
        address: of 4 bytes, in memory of this GPU or of another one that is mapped here.
        number: from 0 to 2^32 - 1.

    Raises:
        RuntimeError: the driver refuses.
    """
    handle = ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address)
    _check("cuStreamWriteValue32", _driver().cuStreamWriteValue32_v2(*handle, ctypes.c_uint32(number), 0))


def wait_for_number(stream: torch.cuda.Stream, address: int, number: int) -> None:
    """Let a stream go on when memory of its GPU holds a number, or a later one.

    Args:
        stream: of this process' GPU.
        address: of 4 bytes of the same GPU.
        number: from 0 to 2^32 - 1.

    Raises:
        RuntimeError: the driver refuses.
    """
    handle = ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address)
    _check("cuStreamWaitValue32", _driver().cuStreamWaitValue32_v2(*handle, ctypes.c_uint32(number), _AT_LEAST))


def _check(what: str, error: int) -> None:
    if error:
        raise RuntimeError(f"{what}: error {error} of the CUDA driver")


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

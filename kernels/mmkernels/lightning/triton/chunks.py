"""Chunks of a row with a state each, through the Triton kernels: one launch scans all chunks of a rank.

A chunk of the row is a segment of the scan. Documents end at its edges, so that every padded chunk of the kernels
(`device/padded_chunks.py`) lies in one segment, which goes on from a state that is given.

Shape letters: T tokens, H heads, D width of q and k, E width of v, N chunks here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.lightning.device.padded_chunks import PaddedChunks, pad_documents
from mmkernels.lightning.triton.autograd import (
    Call,
    check_triton,
    differentiate_kv,
    differentiate_q,
    on_device,
    rows_in_line,
)
from mmkernels.lightning.triton.scan import scan
from mmkernels.lightning.triton.tiling import Partition, Tile, scan_tile


def triton_chunks_forward(
    q_1THD: Tensor, k_1THD: Tensor, v_1THE: Tensor, slopes_H: Tensor, cu_seqlens: Tensor, initial_NHDE: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the padded chunks; see ``chunks_forward``.

    Raises:
        KernelArgumentError: tensors on a CPU, float64, or heads wider than 256.
    """
    check_triton(q_1THD, v_1THE)
    q, k, v = (rows_in_line(x) for x in (q_1THD, k_1THD, v_1THE))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    count, tile = initial_NHDE.shape[0], _tile(q, v, initial_NHDE.shape[0])
    with on_device(q):
        padded_chunks = pad_documents(cu_seqlens, q.shape[1], tile.chunk, segments=count)
        partition = Partition(count, 0, padded_chunks)
        scan(q, k, v, o, slopes_H.float(), partition, tile, initial_state=initial_NHDE.contiguous())
    return o, (padded_chunks.ends_2N, padded_chunks.starts_2N, padded_chunks.segment_firsts_S1)


def triton_chunks_backward(
    q_1THD: Tensor, k_1THD: Tensor, v_1THE: Tensor, do_1THE: Tensor, slopes_H: Tensor, initial_NHDE: Tensor,
    final_gradient: Callable[[], Tensor], saved: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor],
    raw: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Write dq, then ask for the gradients of the states behind the chunks, and write dk and dv; see
    ``chunks_backward``.
    """
    q, k, v, do = (rows_in_line(x) for x in (q_1THD, k_1THD, v_1THE, do_1THE))
    count = initial_NHDE.shape[0]
    call = Call(slopes_H.float(), Partition(count, 0, PaddedChunks(*saved)), _tile(q, v, count))
    dq, dk, dv = grads
    q_raw, *kv_raw = (None,) if raw is None else map(rows_in_line, raw)
    with on_device(q):
        differentiate_q(call, k, v, do, dq, initial=initial_NHDE.contiguous(), raw=q_raw)
        dfinal = final_gradient().contiguous()
        differentiate_kv(call, q, k, v, do, (dk, dv), dfinal=dfinal, raw=tuple(kv_raw) or None)


def _tile(q: Tensor, v: Tensor, count: int) -> Tile:
    """Block shape by the tokens of one chunk: its result does not depend on how many chunks the rank has."""
    return scan_tile(q.dtype, q.shape[3], v.shape[3], q.shape[1] // count)

"""The launches: one scan serves the output, every gradient, prefill and context parallelism.

``out_i = sum over j <= i of exp(-s (i-j)) (a_i . b_j) c_j`` along the walk (README.md):
o = scan(q, k, v); dq = scan(do, v, k); dv = reversed scan(k, q, do); dk = reversed scan(v, do, q).

Shape letters: B batch rows, T tokens, H heads, D width of a and b, E width of c, N segments or documents.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.tiling import Tile, Walk, block_width, ceil_div, precision
from mmkernels.lightning.walk import walk_segment


@triton.jit
def scan_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, marks_ptr, init_ptr, local_ptr, leave_ptr,
    a_token, a_head, b_token, b_head, c_token, c_head, out_token, out_head, raw_token, raw_head, state_d, state_e,
    tokens, heads, segments, length,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, VARLEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One scan. Program = (unit, head, part of E), parts side by side: they share a and b through the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (E + BE - 1) // BE
    walk_segment(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, marks_ptr, init_ptr, local_ptr, leave_ptr,
        a_token, a_head, b_token, b_head, c_token, c_head, out_token, out_head, raw_token, raw_head, state_d, state_e,
        tokens, heads, segments, length, pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads), pid >= 0,
        D, E, C, BD, BE, REVERSE, VARLEN, DOCUMENTS, HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, PRECISION,
    )  # fmt: skip


@triton.jit
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr, slopes_ptr, bounds_ptr,
    marks_ptr, init_ptr, local_ptr, leave_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, dk_token, dk_head, dv_token, dv_head,
    k_raw_token, k_raw_head, v_raw_token, v_raw_head, tokens, heads, segments, length,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    VARLEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both reversed scans in one launch: programs of a head run side by side, sharing q and do in the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (D + BE - 1) // BE
    for_keys = pid % (2 * PARTS) >= PARTS
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = k_ptr, q_ptr, do_ptr, dv_ptr, v_raw_ptr
    if for_keys:
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = v_ptr, do_ptr, q_ptr, dk_ptr, k_raw_ptr
    a_token, a_head = tl.where(for_keys, v_token, k_token), tl.where(for_keys, v_head, k_head)
    b_token, b_head = tl.where(for_keys, do_token, q_token), tl.where(for_keys, do_head, q_head)
    c_token, c_head = tl.where(for_keys, q_token, do_token), tl.where(for_keys, q_head, do_head)
    out_token, out_head = tl.where(for_keys, dk_token, dv_token), tl.where(for_keys, dk_head, dv_head)
    raw_token, raw_head = tl.where(for_keys, k_raw_token, v_raw_token), tl.where(for_keys, k_raw_head, v_raw_head)
    state_d, state_e = tl.where(for_keys, 1, D), tl.where(for_keys, D, 1)
    walk_segment(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, marks_ptr, init_ptr, local_ptr, leave_ptr,
        a_token, a_head, b_token, b_head, c_token, c_head, out_token, out_head, raw_token, raw_head, state_d, state_e,
        tokens, heads, segments, length, pid % PARTS, pid // (2 * PARTS) % heads, pid // (2 * PARTS * heads),
        pid % (2 * PARTS) < PARTS,
        D, D, C, BD, BE, True, VARLEN, DOCUMENTS, HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, PRECISION,
    )  # fmt: skip


def scan(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, slopes_H: Tensor, walk: Walk, tile: Tile, *,
    reverse: bool = False, transposed: bool = False, raw: Tensor | None = None,
    init: Tensor | None = None, local: Tensor | None = None, leave: Tensor | None = None,
) -> None:  # fmt: skip
    """One scan, ``out`` from a, b and c.

    Args:
        a: [B, T, H, D], last stride 1, rows of the batch one after the other (as are all of these).
        b: [B, T, H, D].
        c: [B, T, H, E].
        out: [B, T, H, E], written.
        slopes_H: fp32 [H].
        walk: how units of work share the tokens out.
        tile: block shape.
        reverse: from the last token to the first.
        transposed: the states in memory are [.., E, D], the transpose of the one this scan carries.
        raw: [B, T, H, E] tensor whose SiLU the output is a gradient of: multiply by SiLU's derivative there.
        init: fp32 state before each row or document.
        local: fp32 [B, N, H, ..] states that the segments leave on their own.
        leave: fp32 state after each row or document, written.
    """
    batch, tokens, heads, d = a.shape
    e = c.shape[3]
    units = walk.units(batch)
    raw_or_out = out if raw is None else raw
    scan_kernel[(units * heads * ceil_div(e, tile.columns),)](
        a, b, c, out, raw_or_out, slopes_H, walk.bounds, walk.marks(reverse), init, local, leave,
        *_strides(a), *_strides(b), *_strides(c), *_strides(out), *_strides(raw_or_out),
        1 if transposed else e, d if transposed else 1, tokens, heads, walk.segments, walk.length,
        D=d, E=e, C=tile.chunk, BD=block_width(d), BE=tile.columns, REVERSE=reverse, VARLEN=walk.varlen,
        DOCUMENTS=walk.documents, HAS_INIT=init is not None, HAS_LOCAL=local is not None, LEAVE=leave is not None,
        SILU_GRAD=raw is not None, PRECISION=precision(a.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def scan_keys_values(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dk: Tensor, dv: Tensor, slopes_H: Tensor, walk: Walk, tile: Tile, *,
    raw: tuple[Tensor, Tensor] | None = None,
    init: Tensor | None = None, local: Tensor | None = None, leave: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dk and dv [B, T, H, D]; D must equal E, else use two scans. ``raw`` are the raw k and v."""
    batch, tokens, heads, d = q.shape
    k_raw, v_raw = (dk, dv) if raw is None else raw
    tensors = (q, k, v, do, dk, dv, k_raw, v_raw)
    key_value_kernel[(walk.units(batch) * heads * 2 * ceil_div(d, tile.columns),)](
        *tensors, slopes_H, walk.bounds, walk.marks(reverse=True), init, local, leave,
        *(stride for x in tensors for stride in _strides(x)), tokens, heads, walk.segments, walk.length,
        D=d, C=tile.chunk, BD=block_width(d), BE=tile.columns, VARLEN=walk.varlen, DOCUMENTS=walk.documents,
        HAS_INIT=init is not None, HAS_LOCAL=local is not None, LEAVE=leave is not None,
        SILU_GRAD=raw is not None, PRECISION=precision(q.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _strides(x_BTHK: Tensor) -> tuple[int, int]:
    return x_BTHK.stride(1), x_BTHK.stride(2)

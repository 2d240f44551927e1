"""The launches: one scan serves the output, every gradient, prefill and context parallelism.

``out_i = sum over j <= i of exp(-s (i-j)) (a_i . b_j) c_j`` along the walk (README.md):
o = scan(q, k, v); dq = scan(do, v, k); dv = reversed scan(k, q, do); dk = reversed scan(v, do, q).

Shape letters: B batch rows, T tokens, H heads, D width of a and b, E width of c, N segments or documents.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.device.scan import walk_unit
from mmkernels.lightning.device.tile import either, for_role
from mmkernels.lightning.triton import choice
from mmkernels.lightning.triton.tiling import Tile, Walk, block_width, ceil_div, precision


@triton.jit
def scan_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
    a_head, b_head, c_head, out_head, raw_head, state_d, state_e, tokens, heads, segments, share,
    a_token: tl.constexpr, b_token: tl.constexpr, c_token: tl.constexpr,
    out_token: tl.constexpr, raw_token: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One scan. Program = (unit, head, part of E), parts side by side: they share a and b through the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (E + BE - 1) // BE
    walk_unit(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
        a_head, b_head, c_head, out_head, raw_head, state_d, state_e,
        tokens, heads, segments, share, pid % PARTS, pid // PARTS % heads, pid // (PARTS * heads), pid >= 0,
        a_token, b_token, c_token, out_token, raw_token, D, E, C, BD, BE, REVERSE, MASKED, SLOTS, DOCUMENTS,
        HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr, slopes_ptr, bounds_ptr,
    words_ptr, init_ptr, local_ptr, leave_ptr,
    q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head, tokens, heads, segments, share,
    q_token: tl.constexpr, k_token: tl.constexpr, v_token: tl.constexpr, do_token: tl.constexpr,
    dk_token: tl.constexpr, dv_token: tl.constexpr, k_raw_token: tl.constexpr, v_raw_token: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    MASKED: tl.constexpr, SLOTS: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_INIT: tl.constexpr,
    HAS_LOCAL: tl.constexpr, LEAVE: tl.constexpr, SILU_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both reversed scans in one launch: programs of a head run side by side, sharing q and do in the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (D + BE - 1) // BE
    part, head, z = pid % PARTS, pid // (2 * PARTS) % heads, pid // (2 * PARTS * heads)
    keys = pid % (2 * PARTS) >= PARTS
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = for_role(
        keys, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr
    )
    a_head, b_head, c_head, out_head, raw_head = for_role(
        keys, q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head
    )
    walk_unit(
        a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, bounds_ptr, words_ptr, init_ptr, local_ptr, leave_ptr,
        a_head, b_head, c_head, out_head, raw_head, tl.where(keys, 1, D), tl.where(keys, D, 1),
        tokens, heads, segments, share, part, head, z, pid % (2 * PARTS) < PARTS,
        either(keys, v_token, k_token), either(keys, do_token, q_token), either(keys, q_token, do_token),
        either(keys, dk_token, dv_token), either(keys, k_raw_token, v_raw_token),
        D, D, C, BD, BE, True, MASKED, SLOTS, DOCUMENTS, HAS_INIT, HAS_LOCAL, LEAVE, SILU_GRAD, PRECISION, STAGES,
    )  # fmt: skip


def scan(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, slopes_H: Tensor, walk: Walk, tile: Tile, *,
    reverse: bool = False, transposed: bool = False, raw: Tensor | None = None,
    init: Tensor | None = None, local: Tensor | None = None, leave: Tensor | None = None,
    silu: bool = False,
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
        silu: a, b and c are SiLU of the tensors given; only where ``hopper_takes`` them.
    """
    batch, tokens, heads, d = a.shape
    e = c.shape[3]
    units = walk.units(batch)
    tensors = (a, b, c, out, out if raw is None else raw)
    packed_silu = raw is not None and walk.slots is not None
    kernel, shape = _kernel("scan, SiLU's derivative, packed" if packed_silu else "scan", tensors, tile)
    kernel[(units * heads * ceil_div(e, shape["BE"]),)](
        *tensors, slopes_H, walk.bounds(reverse), walk.words(reverse), init, local, leave,
        *(x.stride(2) for x in tensors), 1 if transposed else e, d if transposed else 1, tokens, heads, walk.segments,
        walk.share, *(x.stride(1) for x in tensors),
        REVERSE=reverse, **_modes(walk, tokens, tile), HAS_INIT=init is not None, HAS_LOCAL=local is not None,
        LEAVE=leave is not None, SILU_GRAD=raw is not None, **shape,
        **({"RAW": True} if silu else {}),
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
    kernel, shape = _kernel("key_value", tensors, tile)
    kernel[(walk.units(batch) * heads * 2 * ceil_div(d, shape["BE"]),)](
        *tensors, slopes_H, walk.bounds(True), walk.words(True), init, local, leave,
        *(x.stride(2) for x in tensors), tokens, heads, walk.segments, walk.share,
        *(x.stride(1) for x in tensors),
        **_modes(walk, tokens, tile), HAS_INIT=init is not None, HAS_LOCAL=local is not None,
        LEAVE=leave is not None, SILU_GRAD=raw is not None, **shape,
    )  # fmt: skip


def _kernel(role: str, tensors: tuple[Tensor, ...], tile: Tile) -> tuple[Any, dict[str, Any]]:
    """The kernel of a launch, and the block shape as it wants that."""
    d = tensors[0].shape[3]
    if choice.hopper_takes(tensors, tile):
        return choice.hopper_launch(role, d, tile.chunk)
    shape = {
        "D": d, "C": tile.chunk, "BD": block_width(d), "BE": tile.columns, "PRECISION": precision(tensors[0].dtype),
        "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if role != "key_value":
        return scan_kernel, {"E": tensors[2].shape[3], **shape}
    return key_value_kernel, shape


def _modes(walk: Walk, tokens: int, tile: Tile) -> dict[str, bool]:
    slots = walk.slots is not None
    return {
        "SLOTS": slots,
        "DOCUMENTS": walk.documents,
        "MASKED": slots or walk.documents or tokens % tile.chunk != 0,
    }

"""The launches: one scan serves the output, every gradient, prefill and context parallelism.

``out_i = sum over j <= i of exp(-s (i-j)) (a_i . b_j) c_j`` along the scan (README.md):
o = scan(q, k, v); dq = scan(do, v, k); dv = reversed scan(k, q, do); dk = reversed scan(v, do, q).

Shape letters: B batch rows, T tokens, H heads, D width of a and b, E width of c, N segments or documents; in kernels K
and V for D and E, BT tokens of a chunk, BK and BV columns of a tile, as in FLA.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.lightning.device.scan import scan_unit
from mmkernels.lightning.device.tile import dk_or_dv_operands, select
from mmkernels.lightning.triton import choice
from mmkernels.lightning.triton.choice import Launch
from mmkernels.lightning.triton.tiling import Partition, Tile, block_width, ceil_div, precision


@triton.jit
def scan_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends,
    segment_firsts, h0, h_segments, ht,
    a_head, b_head, c_head, out_head, raw_head, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
    a_token: tl.constexpr, b_token: tl.constexpr, c_token: tl.constexpr,
    out_token: tl.constexpr, raw_token: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    STATE_PER_SEGMENT: tl.constexpr, USE_INITIAL_STATE: tl.constexpr, USE_SEGMENT_STATES: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One scan. Program = (unit, head, part of V), parts side by side: they share a and b through the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (V + BV - 1) // BV
    scan_unit(
        (a_ptr, a_head, a_token), (b_ptr, b_head, b_token), (c_ptr, c_head, c_token), (out_ptr, out_head, out_token),
        (raw_ptr, raw_head, raw_token), slopes_ptr, cu_seqlens, chunk_starts, chunk_ends, segment_firsts,
        h0, h_segments, ht, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
        pid % PARTS, pid // PARTS % H, pid // (PARTS * H), pid >= 0, K, V, BT, BK, BV,
        REVERSE, MASKED, PADDED_CHUNKS, IS_VARLEN, STATE_PER_SEGMENT, USE_INITIAL_STATE, USE_SEGMENT_STATES,
        STORE_FINAL_STATE, SILU_GRAD, PRECISION, NUM_STAGES,
    )  # fmt: skip


@triton.jit
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr, slopes_ptr,
    cu_seqlens, chunk_starts, chunk_ends, segment_firsts, h0, h_segments, ht,
    q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head, T, H, segments, chunks_per_segment,
    q_token: tl.constexpr, k_token: tl.constexpr, v_token: tl.constexpr, do_token: tl.constexpr,
    dk_token: tl.constexpr, dv_token: tl.constexpr, k_raw_token: tl.constexpr, v_raw_token: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, PADDED_CHUNKS: tl.constexpr, IS_VARLEN: tl.constexpr,
    STATE_PER_SEGMENT: tl.constexpr, USE_INITIAL_STATE: tl.constexpr, USE_SEGMENT_STATES: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr, SILU_GRAD: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Both reversed scans in one launch: programs of a head run side by side, sharing q and do in the L2 cache."""
    pid = tl.program_id(0)
    PARTS: tl.constexpr = (K + BV - 1) // BV
    part, head, unit = pid % PARTS, pid // (2 * PARTS) % H, pid // (2 * PARTS * H)
    is_dk = pid % (2 * PARTS) >= PARTS
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = dk_or_dv_operands(
        is_dk, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr
    )
    a_head, b_head, c_head, out_head, raw_head = dk_or_dv_operands(
        is_dk, q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head
    )
    state_stride_k, state_stride_v = tl.where(is_dk, 1, K), tl.where(is_dk, K, 1)
    stores_final_state = pid % (2 * PARTS) < PARTS
    scan_unit(
        (a_ptr, a_head, select(is_dk, v_token, k_token)), (b_ptr, b_head, select(is_dk, do_token, q_token)),
        (c_ptr, c_head, select(is_dk, q_token, do_token)), (out_ptr, out_head, select(is_dk, dk_token, dv_token)),
        (raw_ptr, raw_head, select(is_dk, k_raw_token, v_raw_token)), slopes_ptr,
        cu_seqlens, chunk_starts, chunk_ends, segment_firsts, h0, h_segments, ht, state_stride_k, state_stride_v,
        T, H, segments, chunks_per_segment, part, head, unit, stores_final_state, K, K, BT, BK, BV,
        True, MASKED, PADDED_CHUNKS, IS_VARLEN, STATE_PER_SEGMENT, USE_INITIAL_STATE, USE_SEGMENT_STATES,
        STORE_FINAL_STATE, SILU_GRAD, PRECISION, NUM_STAGES,
    )  # fmt: skip


def scan(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, slopes_H: Tensor, partition: Partition, tile: Tile, *,
    reverse: bool = False, transposed: bool = False, raw: Tensor | None = None,
    initial_state: Tensor | None = None, segment_states: Tensor | None = None, final_state: Tensor | None = None,
    silu: bool = False,
) -> None:  # fmt: skip
    """One scan, ``out`` from a, b and c.

    Args:
        a: [B, T, H, D], last stride 1, rows of the batch one after the other (as in all of these tensors).
        b: [B, T, H, D].
        c: [B, T, H, E].
        out: [B, T, H, E], written.
        slopes_H: fp32 [H].
        partition: how units of work share the tokens out.
        tile: block shape.
        reverse: from the last token to the first.
        transposed: the states in memory are [.., E, D], the transpose of the state that this scan carries.
        raw: [B, T, H, E] tensor whose SiLU the output is a gradient of: multiply by SiLU's derivative there.
        initial_state: fp32 state before each row or document, or segment of given chunks.
        segment_states: fp32 [B, N, H, ..] states that the segments leave on their own.
        final_state: fp32 state after each row or document, written.
        silu: a, b and c are SiLU of the tensors given; only where ``hopper_takes`` them.
    """
    batch, tokens, heads, d = a.shape
    e = c.shape[3]
    tensors = (a, b, c, out, out if raw is None else raw)
    packed_silu_grad = raw is not None and partition.padded_chunks is not None
    launch = Launch.SCAN_PACKED_SILU_GRAD if packed_silu_grad else Launch.SCAN
    kernel, shape = _kernel(launch, tensors, tile)
    kernel[(partition.units(batch) * heads * ceil_div(e, shape["BV"]),)](
        *tensors, slopes_H, partition.cu_seqlens, partition.chunk_starts(reverse), partition.chunk_ends(reverse),
        partition.segment_firsts, initial_state, segment_states, final_state, *(x.stride(2) for x in tensors),
        1 if transposed else e, d if transposed else 1,
        tokens, heads, partition.segments, partition.chunks_per_segment, *(x.stride(1) for x in tensors),
        REVERSE=reverse, **_modes(partition, tokens, tile), USE_INITIAL_STATE=initial_state is not None,
        USE_SEGMENT_STATES=segment_states is not None, STORE_FINAL_STATE=final_state is not None,
        SILU_GRAD=raw is not None, **shape, **({"APPLY_SILU": True} if silu else {}),
    )  # fmt: skip


def scan_dk_dv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dk: Tensor, dv: Tensor, slopes_H: Tensor,
    partition: Partition, tile: Tile, *, raw: tuple[Tensor, Tensor] | None = None,
    initial_state: Tensor | None = None, segment_states: Tensor | None = None, final_state: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dk and dv [B, T, H, D] by both reversed scans; D must equal E, else use two scans.

    Args:
        q: [B, T, H, D], last stride 1, rows of the batch one after the other (as in all of these tensors).
        k: [B, T, H, D].
        v: [B, T, H, D].
        do: [B, T, H, D], gradient of the output.
        dk: [B, T, H, D], written.
        dv: [B, T, H, D], written.
        slopes_H: fp32 [H].
        partition: how units of work share the tokens out.
        tile: block shape.
        raw: the tensors whose SiLU k and v are; then the gradients are those of the raw tensors.
        initial_state: fp32 gradient of the state after each row or document, or segment of given chunks.
        segment_states: fp32 [B, N, H, D, D] gradients that the segments, reversed, leave on their own.
        final_state: fp32 gradient of the state before each row or document, written.
    """
    batch, tokens, heads, d = q.shape
    k_raw, v_raw = (dk, dv) if raw is None else raw
    tensors = (q, k, v, do, dk, dv, k_raw, v_raw)
    kernel, shape = _kernel(Launch.DK_DV, tensors, tile)
    kernel[(partition.units(batch) * heads * 2 * ceil_div(d, shape["BV"]),)](
        *tensors, slopes_H, partition.cu_seqlens, partition.chunk_starts(True), partition.chunk_ends(True),
        partition.segment_firsts, initial_state, segment_states, final_state, *(x.stride(2) for x in tensors),
        tokens, heads, partition.segments, partition.chunks_per_segment, *(x.stride(1) for x in tensors),
        **_modes(partition, tokens, tile), USE_INITIAL_STATE=initial_state is not None,
        USE_SEGMENT_STATES=segment_states is not None, STORE_FINAL_STATE=final_state is not None,
        SILU_GRAD=raw is not None, **shape,
    )  # fmt: skip


def _kernel(launch: Launch, tensors: tuple[Tensor, ...], tile: Tile) -> tuple[Any, dict[str, Any]]:
    """The kernel of a launch, and the block shape as it wants that."""
    d = tensors[0].shape[3]
    if choice.hopper_takes(tensors, tile):
        return choice.hopper_launch(launch, d, tile.chunk)
    shape = {
        "K": d, "BT": tile.chunk, "BK": block_width(d), "BV": tile.columns, "PRECISION": precision(tensors[0].dtype),
        "NUM_STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if launch is Launch.DK_DV:
        return dk_dv_kernel, shape
    return scan_kernel, {"V": tensors[2].shape[3], **shape}


def _modes(partition: Partition, tokens: int, tile: Tile) -> dict[str, bool]:
    """Flags of a launch that say how its units share the tokens out."""
    padded = partition.padded_chunks is not None
    return {
        "PADDED_CHUNKS": padded,
        "IS_VARLEN": partition.per_document,
        "STATE_PER_SEGMENT": partition.segment_firsts is not None,
        "MASKED": padded or partition.per_document or tokens % tile.chunk != 0,
    }

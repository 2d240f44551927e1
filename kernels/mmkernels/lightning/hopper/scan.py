"""Kernels of the scan for Hopper, in Gluon; `triton/scan.py` launches them in place of its own.

Shape letters, FLA's: T tokens, H heads, BT tokens of a chunk, K width of a, b and c, BV columns of c that a program
holds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mmkernels.lightning.device.tile import dk_or_dv_operands, select
from mmkernels.lightning.hopper.scan_unit import scan_unit_hopper


@gluon.jit
def scan_hopper_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr, slopes_ptr, cu_seqlens, chunk_starts, chunk_ends,
    segment_firsts, h0, h_segments, ht,
    a_head, b_head, c_head, out_head, raw_head, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
    a_token: gl.constexpr, b_token: gl.constexpr, c_token: gl.constexpr,
    out_token: gl.constexpr, raw_token: gl.constexpr,
    K: gl.constexpr, BT: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, MASKED: gl.constexpr, PADDED_CHUNKS: gl.constexpr, IS_VARLEN: gl.constexpr,
    STATE_PER_SEGMENT: gl.constexpr, USE_INITIAL_STATE: gl.constexpr, USE_SEGMENT_STATES: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr, SILU_GRAD: gl.constexpr, NUM_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    APPLY_SILU: gl.constexpr = False,
):  # fmt: skip
    """One scan, launched as `triton.scan.scan_kernel` is."""
    pid = gl.program_id(0)
    PARTS: gl.constexpr = K // BV
    scan_unit_hopper(
        (a_ptr, a_head, a_token), (b_ptr, b_head, b_token), (c_ptr, c_head, c_token), (out_ptr, out_head, out_token),
        (raw_ptr, raw_head, raw_token), slopes_ptr, cu_seqlens, chunk_starts, chunk_ends, segment_firsts,
        h0, h_segments, ht, state_stride_k, state_stride_v, T, H, segments, chunks_per_segment,
        pid % PARTS, pid // PARTS % H, pid // (PARTS * H), pid >= 0, K, BT, BV,
        REVERSE, MASKED, PADDED_CHUNKS, IS_VARLEN, STATE_PER_SEGMENT, USE_INITIAL_STATE, USE_SEGMENT_STATES,
        STORE_FINAL_STATE, SILU_GRAD, NUM_STAGES, WARPGROUPS, APPLY_SILU,
    )  # fmt: skip


@gluon.jit
def dk_dv_hopper_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr, slopes_ptr,
    cu_seqlens, chunk_starts, chunk_ends, segment_firsts, h0, h_segments, ht,
    q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head, T, H, segments, chunks_per_segment,
    q_token: gl.constexpr, k_token: gl.constexpr, v_token: gl.constexpr, do_token: gl.constexpr,
    dk_token: gl.constexpr, dv_token: gl.constexpr, k_raw_token: gl.constexpr, v_raw_token: gl.constexpr,
    K: gl.constexpr, BT: gl.constexpr, BV: gl.constexpr,
    MASKED: gl.constexpr, PADDED_CHUNKS: gl.constexpr, IS_VARLEN: gl.constexpr,
    STATE_PER_SEGMENT: gl.constexpr, USE_INITIAL_STATE: gl.constexpr, USE_SEGMENT_STATES: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr, SILU_GRAD: gl.constexpr, NUM_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Both reversed scans, launched as `triton.scan.dk_dv_kernel` is."""
    pid = gl.program_id(0)
    PARTS: gl.constexpr = K // BV
    is_dk = pid % (2 * PARTS) >= PARTS
    a_ptr, b_ptr, c_ptr, out_ptr, raw_ptr = dk_or_dv_operands(
        is_dk, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, k_raw_ptr, v_raw_ptr
    )
    a_head, b_head, c_head, out_head, raw_head = dk_or_dv_operands(
        is_dk, q_head, k_head, v_head, do_head, dk_head, dv_head, k_raw_head, v_raw_head
    )
    state_stride_k, state_stride_v = gl.where(is_dk, 1, K), gl.where(is_dk, K, 1)
    part, head, unit = pid % PARTS, pid // (2 * PARTS) % H, pid // (2 * PARTS * H)
    stores_final_state = pid % (2 * PARTS) < PARTS
    scan_unit_hopper(
        (a_ptr, a_head, select(is_dk, v_token, k_token)), (b_ptr, b_head, select(is_dk, do_token, q_token)),
        (c_ptr, c_head, select(is_dk, q_token, do_token)), (out_ptr, out_head, select(is_dk, dk_token, dv_token)),
        (raw_ptr, raw_head, select(is_dk, k_raw_token, v_raw_token)), slopes_ptr,
        cu_seqlens, chunk_starts, chunk_ends, segment_firsts, h0, h_segments, ht, state_stride_k, state_stride_v,
        T, H, segments, chunks_per_segment, part, head, unit, stores_final_state, K, BT, BV,
        True, MASKED, PADDED_CHUNKS, IS_VARLEN, STATE_PER_SEGMENT, USE_INITIAL_STATE, USE_SEGMENT_STATES,
        STORE_FINAL_STATE, SILU_GRAD, NUM_STAGES, WARPGROUPS, False, True,
    )  # fmt: skip

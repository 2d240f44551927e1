"""Lightning attention through the Triton kernels, forward and backward, with autograd.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.common.errors import KernelArgumentError
from mmkernels.common.triton_support import check_device
from mmkernels.lightning.device.padded_chunks import pad_documents
from mmkernels.lightning.triton import choice
from mmkernels.lightning.triton.scan import scan, scan_dk_dv
from mmkernels.lightning.triton.states import segment_states
from mmkernels.lightning.triton.tiling import Partition, Tile, pair_tile, processors, scan_tile, segments_for

MAX_WIDTH = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Call:
    """Slopes, partition and tile of one call: forward and backward share them."""

    slopes_H: Tensor
    partition: Partition
    tile: Tile

    @staticmethod
    def plan(q: Tensor, v: Tensor, slopes_H: Tensor, cu_seqlens: Tensor | None, per_document: bool) -> Call:
        """Partition a row into segments when states belong to rows, into documents when each has a state of its own."""
        batch, tokens, heads, d = q.shape
        e = v.shape[3]
        if per_document:
            assert cu_seqlens is not None
            documents = cu_seqlens.shape[0] - 1
            tile = scan_tile(q.dtype, d, e, tokens // max(documents, 1) + 1)
            return Call(slopes_H.float(), Partition(documents, 0, cu_seqlens=cu_seqlens.contiguous()), tile)
        tile = scan_tile(q.dtype, d, e, tokens)
        programs = batch * heads * -(-e // tile.columns)
        segments, length = segments_for(programs, tokens, tile.chunk, processors(q.device))
        padded_chunks = None if cu_seqlens is None else pad_documents(cu_seqlens, tokens, tile.chunk)
        return Call(slopes_H.float(), Partition(segments, length // tile.chunk, padded_chunks), tile)

    def segment_states(self, b: Tensor, c: Tensor, reverse: bool = False, silu: bool = False) -> Tensor | None:
        """States that the segments of each row leave behind; None with one segment, or a state per document."""
        partition, chunk = self.partition, self.tile.chunk
        if partition.segments == 1 or partition.per_document:
            return None
        return segment_states(
            b, c, self.slopes_H, self.tile, segments=partition.segments, length=partition.chunks_per_segment * chunk,
            computed_segments=partition.segments - 1, pad=-b.shape[1] % chunk, padded_chunks=partition.padded_chunks,
            reverse=reverse, silu=silu,
        )  # fmt: skip


def attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, want_final: bool, silu: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output [B, T, H, E], state after each row or document (if wanted), and the states that the segments left.

    With ``silu``, attention is that of SiLU of q, k and v.
    """
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    num_states = call.partition.segments if call.partition.per_document else q.shape[0]
    final = q.new_empty(num_states, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32) if want_final else None
    states = call.segment_states(k, v, silu=silu)
    scan(
        q, k, v, o, call.slopes_H, call.partition, call.tile,
        initial_state=initial, segment_states=states, final_state=final, silu=silu,
    )  # fmt: skip
    return o, final, states


def differentiate(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, grads: tuple[Tensor, Tensor, Tensor],
    *, initial: Tensor | None, states: Tensor | None, dfinal: Tensor | None, want_dinitial: bool,
    raw: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v; return the gradient of the initial state if wanted.

    ``states`` are the forward pass's segment states: dq is a scan with their transpose. ``raw`` are the tensors whose
    SiLU q, k and v are; then the gradients are those of the raw tensors.
    """
    dq, dk, dv = grads
    q_raw, *kv_raw = raw or (None,)
    differentiate_q(call, k, v, do, dq, initial=initial, states=states, raw=q_raw)
    dinitial = torch.empty_like(initial) if want_dinitial and initial is not None else None
    differentiate_kv(
        call, q, k, v, do, (dk, dv),
        dfinal=dfinal, dstates=call.segment_states(q, do, reverse=True), dinitial=dinitial, raw=tuple(kv_raw) or None,
    )  # fmt: skip
    return dinitial


def differentiate_q(
    call: Call, k: Tensor, v: Tensor, do: Tensor, dq: Tensor,
    *, initial: Tensor | None, states: Tensor | None = None, raw: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradient of q, or of ``raw`` if q is its SiLU; states are those of the forward pass."""
    scan(
        do, v, k, dq, call.slopes_H, call.partition, call.tile,
        transposed=True, raw=raw, initial_state=initial, segment_states=states,
    )  # fmt: skip


def differentiate_kv(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, grads: tuple[Tensor, Tensor],
    *, dfinal: Tensor | None, dstates: Tensor | None = None, dinitial: Tensor | None = None,
    raw: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write the gradients of k and v, or of the ``raw`` tensors whose SiLU they are, and that of the initial state."""
    slopes, partition, tile = call.slopes_H, call.partition, call.tile
    dk, dv = grads
    states = {"initial_state": dfinal, "segment_states": dstates}
    if q.shape[3] == v.shape[3]:
        scan_dk_dv(
            q, k, v, do, dk, dv, slopes, partition, pair_tile(tile, raw is not None), raw=raw, final_state=dinitial,
            **states,
        )  # fmt: skip
    else:
        k_raw, v_raw = raw or (None, None)
        scan(k, q, do, dv, slopes, partition, tile, reverse=True, raw=v_raw, final_state=dinitial, **states)
        other = scan_tile(q.dtype, v.shape[3], q.shape[3], tile.chunk)
        scan(v, do, q, dk, slopes, partition, other, reverse=True, transposed=True, raw=k_raw, **states)


class _Attention(torch.autograd.Function):
    """Saves q, k, v, the initial state and the segments' states."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, call: Call, want_final: bool
    ) -> tuple[Tensor, Tensor | None]:
        o, final, states = attend(call, q, k, v, initial, want_final)
        ctx.call = call
        ctx.save_for_backward(q, k, v, initial, states)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, initial, states = ctx.saved_tensors
        do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else rows_in_line(do)
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        dfinal = None if dfinal is None else dfinal.contiguous()
        with on_device(q):
            dinitial = differentiate(
                ctx.call, q, k, v, do, grads,
                initial=initial, states=states, dfinal=dfinal, want_dinitial=ctx.needs_input_grad[3],
            )  # fmt: skip
        return *grads, dinitial, None, None


class _SiluAttention(torch.autograd.Function):
    """Saves the projection and the segments' states; and SiLU of the projection, unless it is to be computed again.

    Where nothing keeps SiLU's result, a kernel for Hopper applies it inside.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, qkv_BTHX: Tensor, call: Call, keep: bool) -> Tensor:
        inside = not keep and choice.hopper_takes(_thirds(qkv_BTHX), call.tile)
        act_BTHX = qkv_BTHX if inside else F.silu(qkv_BTHX)
        o, _, states = attend(call, *_thirds(act_BTHX), None, False, silu=inside)
        ctx.call = call
        ctx.save_for_backward(qkv_BTHX, act_BTHX if keep else None, states)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor, None, None]:
        raw_BTHX, act_BTHX, states = ctx.saved_tensors
        grad_BTHX = torch.empty_like(raw_BTHX)
        with on_device(do):
            act_BTHX = F.silu(raw_BTHX) if act_BTHX is None else act_BTHX
            differentiate(
                ctx.call, *_thirds(act_BTHX), rows_in_line(do), _thirds(grad_BTHX),
                initial=None, states=states, dfinal=None, want_dinitial=False, raw=_thirds(raw_BTHX),
            )  # fmt: skip
        return grad_BTHX, None, None


def triton_lightning_attention(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, slopes_H: Tensor, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, output_final_state: bool, row_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The Triton backend of ``lightning_attention``; arguments are checked there, but for what Triton cannot take.

    Raises:
        KernelArgumentError: tensors on a CPU, float64, or heads wider than 256.
    """
    check_triton(q_BTHD, v_BTHE)
    q, k, v = (rows_in_line(x) for x in (q_BTHD, k_BTHD, v_BTHE))
    stateful = initial_state is not None or output_final_state
    per_document = cu_seqlens is not None and stateful and not row_state
    if q.numel() == 0 or v.numel() == 0:
        return _nothing(q, k, v, cu_seqlens, initial_state, output_final_state, per_document)
    initial = None if initial_state is None else initial_state.contiguous()
    with on_device(q):
        call = Call.plan(q, v, slopes_H, cu_seqlens, per_document)
        return _Attention.apply(q, k, v, initial, call, output_final_state)


def triton_silu_attention(qkv_BTHX: Tensor, slopes_H: Tensor, cu_seqlens: Tensor | None, recompute: bool) -> Tensor:
    """The Triton backend of ``silu_lightning_attention``.

    Raises:
        KernelArgumentError: tensors on a CPU, float64, or heads wider than 256.
    """
    q, _, v = _thirds(qkv_BTHX)
    check_triton(q, v)
    if qkv_BTHX.numel() == 0:
        return qkv_BTHX[..., : q.shape[3]] * 0
    qkv = rows_in_line(qkv_BTHX)
    with on_device(qkv):
        keep = torch.is_grad_enabled() and qkv.requires_grad and not recompute
        return _SiluAttention.apply(qkv, Call.plan(q, v, slopes_H, cu_seqlens, per_document=False), keep)


def triton_segment_states(
    k_BTHD: Tensor, v_BTHE: Tensor, slopes_H: Tensor, segments: int, cu_seqlens: Tensor | None, reverse: bool
) -> Tensor:
    """The Triton backend of ``lightning_segment_states``: fp32 [B, N, H, D, E] in token order.

    Raises:
        KernelArgumentError: tensors on a CPU, float64, or heads wider than 256.
    """
    check_triton(k_BTHD, v_BTHE)
    k, v = rows_in_line(k_BTHD), rows_in_line(v_BTHE)
    length = k.shape[1] // segments
    tile = scan_tile(k.dtype, k.shape[3], v.shape[3], length)  # not by the row: a state is that of its segment alone
    with on_device(k):
        states = segment_states(
            k, v, slopes_H.float(), tile, segments=segments, length=length, computed_segments=segments,
            cu_seqlens=cu_seqlens, reverse=reverse,
        )  # fmt: skip
    return states.flip(1) if reverse else states  # a reversed scan meets the last segment first


def check_triton(q: Tensor, v: Tensor) -> None:
    """Refuse tensors that the kernels cannot take.

    Raises:
        KernelArgumentError: tensors on a CPU, float64, or heads wider than 256.
    """
    check_device("q_BTHD", q)
    if q.dtype not in DTYPES:
        raise KernelArgumentError("q_BTHD", f"dtype {q.dtype}", "bfloat16, float16 or float32 for backend triton")
    for name, x in (("q_BTHD", q), ("v_BTHD", v)):
        if x.shape[3] > MAX_WIDTH:
            raise KernelArgumentError(name, f"head dimension {x.shape[3]}", f"1 to {MAX_WIDTH} for backend triton")


def rows_in_line(x_BTHK: Tensor) -> Tensor:
    """The tensor itself when the kernels can scan it: last stride 1, and the rows of the batch one after the other."""
    batch, tokens = x_BTHK.shape[:2]
    fits = x_BTHK.stride(3) == 1 and (batch == 1 or x_BTHK.stride(0) == tokens * x_BTHK.stride(1))
    return x_BTHK if fits else x_BTHK.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def _thirds(x_BTHX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = x_BTHX.shape[3] // 3
    q, k, v = x_BTHX.split(width, dim=3)
    return q, k, v


def _nothing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    want_final: bool,
    documents: bool,
) -> tuple[Tensor, Tensor | None]:
    """No token, head or width: an empty output that still belongs to the graph, and the states as they came."""
    o = (q.sum() + k.sum() + v.sum()).to(q.dtype) * v.new_zeros(*q.shape[:3], v.shape[3])
    if not want_final:
        return o, None
    num_states = cu_seqlens.shape[0] - 1 if documents and cu_seqlens is not None else q.shape[0]
    zeros = q.new_zeros(num_states, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return o, zeros if initial is None else initial + zeros

"""Lightning attention in chunks, in torch: the fast path on CPU, forward and backward written by hand.

Lightning Attention-2, Alg. 1 and 2, with the loops over chunks turned into batched products: see README.md.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, C tokens of a chunk, N chunks of a
segment, G heads of a group, R = B*G*N chunks of a unit of work, in that order; K saved states.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.lightning.checks import state_dtype
from mmkernels.lightning.eager.decay import DecayTables
from mmkernels.lightning.eager.documents import attend_documents, document_ids, segment_masks
from mmkernels.lightning.eager.plan import Plan, make_plan
from mmkernels.lightning.eager.unit import Unit

# Up to this size the backward gets every chunk's state (about the size of q, 12% less backward time); beyond, only one
# a segment, and it recomputes the others: the page faults of so much fresh memory cost what that saves.
DENSE_STATE_BYTES = 64 * 1024 * 1024


def chunked_lightning_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_NHDE: Tensor | None,
    output_final_state: bool,
    row_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Backend ``chunked``; arguments as in ``lightning_attention``, already checked."""
    # Autocast would turn the products inside into bfloat16, the state's among them.
    with torch.autocast(q_BTHD.device.type, enabled=False):
        if cu_seqlens is None:
            o_BTHE, final_BHDE = _attend_rows(q_BTHD, k_BTHD, v_BTHE, slopes_H, None, initial_NHDE)
            return o_BTHE, final_BHDE if output_final_state else None
        if row_state:
            ids_T = document_ids(cu_seqlens, q_BTHD.shape[1])
            o_BTHE, final_BHDE = _attend_rows(q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, initial_NHDE)
            return o_BTHE, final_BHDE if output_final_state else None
        return attend_documents(
            q_BTHD, k_BTHD, v_BTHE, slopes_H, cu_seqlens, initial_NHDE, output_final_state, _attend_rows
        )


def _attend_rows(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHE: Tensor, slopes_H: Tensor, ids_T: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    # needs_input_grad does not know about no_grad, so ask here.
    inputs = (q_BTHD, k_BTHD, v_BTHE, initial)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _ChunkedAttention.apply(q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, initial, save)


def forward_pass(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    ids_T: Tensor | None,
    initial_BHDE: Tensor | None,
    plan: Plan,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and states of rows with one entering state each.

    Returns:
        ``(o_BTHE, states_KBHDE)``. The states are those entering each chunk (``dense``) or each segment, and last the
        one leaving the row.
    """
    B, T, H, D = q_BTHD.shape
    E, acc = v_BTHE.shape[3], state_dtype(q_BTHD.dtype)
    tables = DecayTables.build(slopes_H, plan.chunk, plan.widest, acc)
    o_BTHE = torch.empty(B, T, H, E, dtype=q_BTHD.dtype, device=q_BTHD.device)
    num_states = plan.chunks if dense else len(plan.segments)
    states_BHKDE = torch.empty(B, H, num_states + 1, D, E, dtype=acc, device=q_BTHD.device)
    carry_BHDE = torch.zeros(B, H, D, E, dtype=torch.float64, device=q_BTHD.device)
    if initial_BHDE is not None:
        carry_BHDE.copy_(initial_BHDE)
    for index, segment in enumerate(plan.segments):
        masks = None if ids_T is None else segment_masks(ids_T, segment, acc)
        for heads in segment.groups(H):
            unit = Unit(segment, heads, tables, masks, B, acc)
            q, k, v = unit.blocks(q_BTHD), unit.blocks(k_BTHD), unit.blocks(v_BTHE)
            scores = torch.bmm(q, k.transpose(1, 2))
            unit.decay_scores_(scores)
            o = torch.bmm(scores, v)
            if dense:
                path = states_BHKDE[:, heads, segment.first : segment.first + segment.chunks + 1]
            else:
                path = unit.new_states(D, E)
                states_BHKDE[:, heads, index].copy_(carry_BHDE[:, heads])
            path[:, :, 0].copy_(carry_BHDE[:, heads])
            unit.scan_forward_(path, torch.bmm(unit.scale_leaving(k).transpose(1, 2), v), carry_BHDE[:, heads])
            o.baddbmm_(unit.scale_entering(q), path[:, :, :-1].flatten(0, 2))
            unit.store(o_BTHE, o)
    states_BHKDE[:, :, -1].copy_(carry_BHDE)
    return o_BTHE, states_BHKDE


def backward_pass(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    ids_T: Tensor | None,
    states_BHKDE: Tensor,
    do_BTHE: Tensor,
    dfinal_BHDE: Tensor | None,
    plan: Plan,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(dq, dk, dv, dinitial_BHDE)``, from those of the output and of the final state (None: zero)."""
    B, _, H, D = q_BTHD.shape
    E, acc = v_BTHE.shape[3], states_BHKDE.dtype
    tables = DecayTables.build(slopes_H, plan.chunk, plan.widest, acc)
    dq_BTHD, dk_BTHD, dv_BTHE = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHD, k_BTHD, v_BTHE))
    carry_BHDE = torch.zeros(B, H, D, E, dtype=torch.float64, device=q_BTHD.device)
    if dfinal_BHDE is not None:
        carry_BHDE.copy_(dfinal_BHDE)
    for index in range(len(plan.segments) - 1, -1, -1):
        segment = plan.segments[index]
        masks = None if ids_T is None else segment_masks(ids_T, segment, acc)
        for heads in segment.groups(H):
            unit = Unit(segment, heads, tables, masks, B, acc)
            q, k, v, do = (unit.blocks(x) for x in (q_BTHD, k_BTHD, v_BTHE, do_BTHE))
            k_out = unit.scale_leaving(k)
            if dense:
                entering = states_BHKDE[:, heads, segment.first : segment.first + segment.chunks]
            else:
                path = unit.new_states(D, E)
                path[:, :, 0].copy_(states_BHKDE[:, heads, index])
                unit.scan_forward_(path, torch.bmm(k_out.transpose(1, 2), v))
                entering = path[:, :, :-1]
            dpath = unit.new_states(D, E)
            dpath[:, :, -1].copy_(carry_BHDE[:, heads])
            local = torch.bmm(unit.scale_entering(q).transpose(1, 2), do)
            unit.scan_backward_(dpath, local, carry_BHDE[:, heads])
            leaving = dpath[:, :, 1:].flatten(0, 2)

            weights = unit.score_weights()
            scores = torch.bmm(q, k.transpose(1, 2))
            unit.decay_scores_(scores, weights)
            dv = torch.bmm(scores.transpose(1, 2), do).baddbmm_(k_out, leaving)
            unit.store(dv_BTHE, dv)
            dscores = torch.bmm(do, v.transpose(1, 2), out=scores)
            unit.decay_scores_(dscores, weights)
            dq = torch.bmm(dscores, k)
            dq.baddbmm_(unit.scale_entering(do), entering.flatten(0, 2).transpose(1, 2))
            unit.store(dq_BTHD, dq)
            dk = torch.bmm(dscores.transpose(1, 2), q)
            dk.baddbmm_(unit.scale_leaving(v), leaving.transpose(1, 2))
            unit.store(dk_BTHD, dk)
    return dq_BTHD, dk_BTHD, dv_BTHE, carry_BHDE.to(acc)


class _ChunkedAttention(torch.autograd.Function):
    """Rows with one entering state each; ``ids_T`` marks the documents of a packed row (B == 1)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHE: Tensor,
        slopes_H: Tensor,
        ids_T: Tensor | None,
        initial_BHDE: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, D = q_BTHD.shape
        E, size = v_BTHE.shape[3], state_dtype(q_BTHD.dtype).itemsize
        plan = make_plan(B, T, H, max(D, E), size)
        dense = save and B * H * (plan.chunks + 1) * D * E * size <= DENSE_STATE_BYTES
        o_BTHE, states_BHKDE = forward_pass(q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, initial_BHDE, plan, dense)
        if save:
            ctx.save_for_backward(q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, states_BHKDE)
            ctx.plan, ctx.dense, ctx.has_initial = plan, dense, initial_BHDE is not None
            ctx.set_materialize_grads(False)
        return o_BTHE, states_BHKDE[:, :, -1].clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_BTHE: Tensor | None, dfinal_BHDE: Tensor | None) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, states_BHKDE = ctx.saved_tensors
        if do_BTHE is None:
            do_BTHE = torch.zeros_like(v_BTHE)
        with torch.autocast(q_BTHD.device.type, enabled=False):
            dq, dk, dv, dinitial_BHDE = backward_pass(
                q_BTHD, k_BTHD, v_BTHE, slopes_H, ids_T, states_BHKDE, do_BTHE, dfinal_BHDE, ctx.plan, ctx.dense
            )
        return dq, dk, dv, None, None, dinitial_BHDE if ctx.has_initial else None, None

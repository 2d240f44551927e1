"""The definition of lightning attention: a float64 recurrence over tokens, differentiable by plain autograd.

Slow (a Python loop over tokens) and exact. It is the oracle of every other backend.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def naive_lightning_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor | None = None,
    initial_state_NHDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = exp(-s) S_{t-1} + k_t^T v_t; o_t = q_t S_t`` (MiniMax-01 paper 2.2.2), document by document.

    Args:
        q_BTHD: queries of any floating dtype, upcast to float64.
        k_BTHD: keys of any floating dtype, upcast to float64.
        v_BTHE: values of any floating dtype, upcast to float64.
        slopes_H: decay slope of each head.
        cu_seqlens: [N+1] document offsets of a packed row (then B == 1), or None for one document per batch row.
        initial_state_NHDE: state before each document's first token; zeros when None.

    Returns:
        ``(o_BTHE, final_state_NHDE)``, both float64: the public function casts them back.
    """
    q, k, v = q_BTHD.double(), k_BTHD.double(), v_BTHE.double()
    decay_H11 = torch.exp(-slopes_H.double())[:, None, None]
    if cu_seqlens is None:
        documents = [(q[b], k[b], v[b]) for b in range(q.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        documents = [(q[0, lo:hi], k[0, lo:hi], v[0, lo:hi]) for lo, hi in pairwise(bounds)]
    zero_HDE = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
    outputs, finals = [], []
    for n, (q_THD, k_THD, v_THE) in enumerate(documents):
        state_HDE = zero_HDE if initial_state_NHDE is None else initial_state_NHDE[n].double()
        o_THE, state_HDE = _recurrence(q_THD, k_THD, v_THE, decay_H11, state_HDE)
        outputs.append(o_THE)
        finals.append(state_HDE)
    final_NHDE = torch.stack(finals) if finals else zero_HDE.new_zeros(0, *zero_HDE.shape)
    if cu_seqlens is not None:
        return torch.cat([v[0, :0], *outputs])[None], final_NHDE
    return torch.stack(outputs) if outputs else torch.zeros_like(v), final_NHDE


def _recurrence(
    q_THD: Tensor, k_THD: Tensor, v_THE: Tensor, decay_H11: Tensor, state_HDE: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and final state of one document, one token at a time."""
    rows = []
    for q_HD, k_HD, v_HE in zip(q_THD.unbind(0), k_THD.unbind(0), v_THE.unbind(0), strict=True):
        state_HDE = decay_H11 * state_HDE + k_HD[:, :, None] * v_HE[:, None, :]
        rows.append(torch.einsum("hd,hde->he", q_HD, state_HDE))
    return (torch.stack(rows) if rows else torch.zeros_like(v_THE)), state_HDE

"""Softmax attention across ranks where the tails of each rank travel around the ring, from rank to next rank.

At each step a rank computes its queries against the tails of one rank, of which the next rank's are then under way:
two buffers of one rank's keys. Tails travel as far as somebody needs them. Backward, gradients follow their keys one
step behind, each rank adds its own, and the last one sends them home.

Legend: S tokens here, H heads, G key/value heads, K head width, P tokens of one rank's shared tails.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.softmax import softmax_backward, softmax_forward, softmax_merge
from mmtrain.parallel.context.flights import Flight
from mmtrain.parallel.context.softmax_parts import GradientSum, Grads, LocalPart, pack_tails, wide
from mmtrain.parallel.context.tail_plan import TailPlan
from mmtrain.parallel.context.tails import Rectangle

ALL = slice(None)


def forward(
    q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, plan: TailPlan, local: LocalPart, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Output [S, H, K] and log-sum-exp [H, S] over all keys; parts are joined in float32 and rounded once."""
    q_SHK = q_SHK.detach()
    for step, source, kv_P2GK in _travel(pack_tails(k_SGK, v_SGK, plan, ALL), plan, group):
        if step == 0:
            o_SHK, lse_HS = local.forward(q_SHK, k_SGK, v_SGK)
            outputs = [o_SHK[r.rows].to(wide(o_SHK.dtype)) for r in plan.rectangles]
        for place, rectangle, keys in _with_keys(plan, source):
            rows = rectangle.rows
            part = softmax_forward(q_SHK[rows], kv_P2GK[keys, 0], kv_P2GK[keys, 1], causal=False)
            softmax_merge(outputs[place], lse_HS[:, rows], *part)
        del kv_P2GK  # before memory for the tails after the next is taken
    for rectangle, output in zip(plan.rectangles, outputs, strict=True):
        o_SHK[rectangle.rows] = output
    return o_SHK, lse_HS


def backward(
    do_SHK: Tensor, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, o_SHK: Tensor, lse_HS: Tensor, plan: TailPlan,
    local: LocalPart, group: ProcessGroup,
) -> Grads:  # fmt: skip
    """dq, dk and dv; the local part while the first keys travel."""
    total = GradientSum(lambda: local.backward(do_SHK, q_SHK, k_SGK, v_SGK, o_SHK, lse_HS))
    dq_R = [torch.zeros_like(q_SHK[r.rows], dtype=wide(q_SHK.dtype)) for r in plan.rectangles]
    gradients: _GradientRing | None = None
    for step, source, kv_P2GK in _travel(pack_tails(k_SGK, v_SGK, plan, ALL), plan, group):
        if step == 0:
            total.compute_local()
        dkv_P2GK = torch.zeros_like(kv_P2GK, dtype=wide(kv_P2GK.dtype))
        for place, rectangle, keys in _with_keys(plan, source):
            rows = rectangle.rows
            dq, dk, dv = softmax_backward(
                do_SHK[rows], q_SHK[rows], kv_P2GK[keys, 0], kv_P2GK[keys, 1], o_SHK[rows], lse_HS[:, rows],
                causal=False,
            )  # fmt: skip
            dq_R[place] += dq
            dkv_P2GK[keys, 0] += dk
            dkv_P2GK[keys, 1] += dv
        if step == 0:
            gradients = _GradientRing(dkv_P2GK, plan, group)
        else:
            gradients.pass_on(dkv_P2GK, step)
        del kv_P2GK, dkv_P2GK
    for rectangle, dq in zip(plan.rectangles, dq_R, strict=True):
        total.add(0, rectangle.rows, ALL, dq)
    dkv_P2GK = gradients.come_home()
    for chunk in plan.shared.chunks:
        for which in (1, 2):
            total.add(which, plan.tail_rows(chunk), ALL, dkv_P2GK[plan.shared.rows(chunk), which - 1])
    return total.totals()


def buffer_bytes(plan: TailPlan, kv_heads: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of all buffers, backward: keys of two steps; gradients computed, arriving, leaving, own and come home."""
    return plan.most_shared * 2 * kv_heads * width * (2 * dtype.itemsize + 5 * wide(dtype).itemsize)


def _with_keys(plan: TailPlan, source: int) -> Iterator[tuple[int, Rectangle, slice]]:
    """This rank's rectangles that need tails of `source`: place, rectangle, and the tails' slice of the buffer."""
    for place, rectangle in enumerate(plan.rectangles):
        keys = plan.shared_R[source].between(rectangle.first, rectangle.stop)
        if keys.stop > keys.start:
            yield place, rectangle, keys


def _travel(kv_P2GK: Tensor, plan: TailPlan, group: ProcessGroup) -> Iterator[tuple[int, int, Tensor]]:
    """Step, source and tails of each step; the next ones are then under way. Empty where they do not come this far."""
    ranks = group.size()
    for step in range(plan.steps + 1):
        source, next_source = (plan.rank - step) % ranks, (plan.rank - step - 1) % ranks
        goes_on = step < plan.hops_R[source]
        tokens = plan.shared_R[next_source].tokens if step < plan.hops_R[next_source] else 0
        arriving_P2GK = kv_P2GK.new_empty(tokens, *kv_P2GK.shape[1:])
        send = [(kv_P2GK, (plan.rank + 1) % ranks)] if goes_on else []
        flight = Flight(send, [(arriving_P2GK, (plan.rank - 1) % ranks)], group)
        yield step, source, kv_P2GK
        flight.wait()
        kv_P2GK = arriving_P2GK


class _GradientRing:
    """Gradients of each rank's tails, which go the way of the keys and then home."""

    def __init__(self, own_P2GK: Tensor, plan: TailPlan, group: ProcessGroup) -> None:
        self._own_P2GK, self._plan, self._group = own_P2GK, plan, group
        self._home_P2GK: Tensor | None = None
        self._arriving_P2GK: Tensor | None = None
        self._flight: Flight | None = None

    def pass_on(self, dkv_P2GK: Tensor, step: int) -> None:
        """Add what earlier ranks found to this rank's part of a step from 1 on, and send it on or home."""
        plan, ranks = self._plan, self._group.size()
        if self._flight is not None:
            self._flight.wait()
            dkv_P2GK += self._arriving_P2GK
        source, next_source = (plan.rank - step) % ranks, (plan.rank - step - 1) % ranks
        last = step == plan.hops_R[source]
        send = [(dkv_P2GK, source if last else (plan.rank + 1) % ranks)] if step <= plan.hops_R[source] else []
        tokens = plan.shared_R[next_source].tokens if step < plan.hops_R[next_source] else 0
        self._arriving_P2GK = dkv_P2GK.new_empty(tokens, *dkv_P2GK.shape[1:])
        receive = [(self._arriving_P2GK, (plan.rank - 1) % ranks)]
        if step == plan.hops_R[plan.rank]:
            self._home_P2GK = torch.empty_like(self._own_P2GK)
            receive.append((self._home_P2GK, (plan.rank + step) % ranks))
        self._flight = Flight(send, receive, self._group)

    def come_home(self) -> Tensor:
        """Wait for the gradients of this rank's tails, with its own part."""
        if self._flight is not None:
            self._flight.wait()
        return self._own_P2GK if self._home_P2GK is None else self._own_P2GK.add_(self._home_P2GK)

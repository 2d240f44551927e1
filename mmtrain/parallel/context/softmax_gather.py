"""Softmax attention across ranks where each rank brings all tails that it needs, some key/value heads at a time.

The tails of one document lie in the order of the row, so that the keys of a rectangle are one slice. While a group of
heads is computed, the next one's tails are under way, and the first one's during the local part. Backward brings the
keys again, which is cheaper than keeping them, and returns the gradients by the mirrored messages.

Legend: S tokens here, H heads, G key/value heads, g of them in a group, K head width, P tokens of needed tails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.softmax import softmax_backward, softmax_forward, softmax_merge
from mmtrain.parallel.context.flights import Flight
from mmtrain.parallel.context.softmax_parts import GradientSum, Grads, LocalPart, pack_tails, wide
from mmtrain.parallel.context.tail_plan import TailPlan
from mmtrain.parallel.context.tails import Tails

SMALL = 2**28
"""Bytes of the buffers of all heads up to which they are one group: more calls take longer than the messages."""


def forward(
    q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, plan: TailPlan, local: LocalPart, group: ProcessGroup, budget: int
) -> tuple[Tensor, Tensor]:
    """Output [S, H, K] and log-sum-exp [H, S] over all keys."""
    q_SHK = q_SHK.detach()
    o_SHK = lse_HS = None
    for heads, arrive in _keys(k_SGK, v_SGK, plan, group, head_groups(plan, k_SGK, budget, backward=False)):
        if o_SHK is None:
            o_SHK, lse_HS = local.forward(q_SHK, k_SGK, v_SGK)
        queries, kv_P2gK = _query_heads(heads, q_SHK, k_SGK), arrive()
        for rectangle in plan.rectangles:
            rows, keys = rectangle.rows, plan.needed.between(rectangle.first, rectangle.stop)
            part = softmax_forward(q_SHK[rows, queries], kv_P2gK[keys, 0], kv_P2gK[keys, 1], causal=False)
            softmax_merge(o_SHK[rows, queries], lse_HS[queries, rows], *part)
        del kv_P2gK, arrive  # before memory for the tails after the next is taken
    return o_SHK, lse_HS


def backward(
    do_SHK: Tensor, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, o_SHK: Tensor, lse_HS: Tensor, plan: TailPlan,
    local: LocalPart, group: ProcessGroup, budget: int,
) -> Grads:  # fmt: skip
    """dq, dk and dv. The local part comes last, while gradients return, or first where its results take less memory."""
    total = GradientSum(lambda: local.backward(do_SHK, q_SHK, k_SGK, v_SGK, o_SHK, lse_HS))
    local_first = _early_bytes(plan, q_SHK, k_SGK) > budget
    returning: _Returned | None = None
    for heads, arrive in _keys(k_SGK, v_SGK, plan, group, head_groups(plan, k_SGK, budget, backward=True)):
        if local_first:
            total.compute_local()  # once, while the first keys come
        queries, kv_P2gK = _query_heads(heads, q_SHK, k_SGK), arrive()
        dkv_P2gK = torch.zeros_like(kv_P2gK, dtype=wide(kv_P2gK.dtype))
        for rectangle in plan.rectangles:
            rows, keys = rectangle.rows, plan.needed.between(rectangle.first, rectangle.stop)
            dq, dk, dv = softmax_backward(
                do_SHK[rows, queries], q_SHK[rows, queries], kv_P2gK[keys, 0], kv_P2gK[keys, 1], o_SHK[rows, queries],
                lse_HS[queries, rows], causal=False,
            )  # fmt: skip
            total.add(0, rows, queries, dq)
            dkv_P2gK[keys, 0] += dk
            dkv_P2gK[keys, 1] += dv
        del kv_P2gK, arrive
        if returning is not None:
            returning.add_to(total, plan)
        returning = _Returned.start(dkv_P2gK, plan, heads, group)
        del dkv_P2gK
    total.compute_local()
    returning.add_to(total, plan)
    return total.totals()


def head_groups(plan: TailPlan, k_SGK: Tensor, budget: int, backward: bool) -> list[slice]:
    """Groups of key/value heads that fit the budget, as even as can be: the same on all ranks.

    At least two, where there are two heads and more than a little to bring, so that one's messages are hidden behind
    the other.
    """
    kv_heads = k_SGK.shape[1]
    each = max(1, head_bytes(plan, k_SGK.shape[2], k_SGK.dtype, backward))
    least = 1 if each * kv_heads <= SMALL else 2
    count = min(kv_heads, max(least, -(-kv_heads // max(1, budget // each))))
    return [slice(i * kv_heads // count, (i + 1) * kv_heads // count) for i in range(count)]


def head_bytes(plan: TailPlan, width: int, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of all buffers for one key/value head of a group, while one group is computed and another under way."""
    keys = 2 * (plan.most_received + plan.most_shared)
    grads = 2 * plan.most_received + plan.most_returned + plan.most_shared if backward else 0
    return 2 * width * (keys * dtype.itemsize + grads * wide(dtype).itemsize)


def _keys(
    k_SGK: Tensor, v_SGK: Tensor, plan: TailPlan, group: ProcessGroup, head_groups: list[slice]
) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
    """Each group of heads and a function that waits for its tails [P, 2, g, K]; the next ones are then under way."""
    coming = _bring(k_SGK, v_SGK, plan, head_groups[0], group)
    for place, heads in enumerate(head_groups):
        now, coming = coming, None
        if place + 1 < len(head_groups):
            coming = _bring(k_SGK, v_SGK, plan, head_groups[place + 1], group)
        yield heads, now


def _bring(k_SGK: Tensor, v_SGK: Tensor, plan: TailPlan, heads: slice, group: ProcessGroup) -> Callable[[], Tensor]:
    """Start to bring the needed tails of a group of heads; the result waits for them."""
    shared_P2gK = pack_tails(k_SGK, v_SGK, plan, heads)
    needed_P2gK = shared_P2gK.new_empty(plan.needed.tokens, *shared_P2gK.shape[1:])
    send = [(shared_P2gK[plan.shared.between(run[0], run[-1] + 1)], rank) for rank, run in plan.sends]
    receive = [(needed_P2gK[plan.needed.between(run[0], run[-1] + 1)], rank) for rank, run in plan.receives]
    flight = Flight(send, receive, group)
    for chunk in plan.needed.chunks:
        if chunk in plan.shard.chunks:
            needed_P2gK[plan.needed.rows(chunk)] = shared_P2gK[plan.shared.rows(chunk)]

    def arrive() -> Tensor:
        flight.wait()
        return needed_P2gK

    return arrive


@dataclass
class _Returned:
    """Gradients of tails on their way to the owners.

    Attributes:
        flight: the messages.
        parts_R: what each rank that needs tails of this one found, this one too: chunks and gradients, in the order of
            the ranks.
        heads: the group of key/value heads.
    """

    flight: Flight
    parts_R: list[tuple[list[int], list[Tensor]]]
    heads: slice

    @staticmethod
    def start(dkv_P2gK: Tensor, plan: TailPlan, heads: slice, group: ProcessGroup) -> _Returned:
        """Send every gradient to the owner of the tail."""
        send = [(dkv_P2gK[plan.needed.between(run[0], run[-1] + 1)], rank) for rank, run in plan.receives]
        receive, parts_R = [], []
        for rank in range(group.size()):
            chunks = [chunk for chunk in plan.shard.chunks if plan.needs_RM[rank, chunk]]
            tails, found_P2gK = plan.needed, dkv_P2gK
            if rank != plan.rank:
                tails = Tails.of(chunks, plan.shard.tail_M)
                found_P2gK = dkv_P2gK.new_empty(tails.tokens, *dkv_P2gK.shape[1:])
                runs = [run for receiver, run in plan.sends if receiver == rank]
                receive += [(found_P2gK[tails.between(run[0], run[-1] + 1)], rank) for run in runs]
            parts_R.append((chunks, [found_P2gK[tails.rows(chunk)] for chunk in chunks]))
        return _Returned(Flight(send, receive, group), parts_R, heads)

    def add_to(self, total: GradientSum, plan: TailPlan) -> None:
        """Wait, sum each tail's gradients in the order of the ranks, and add them to the rank's own."""
        self.flight.wait()
        example = next((parts[0] for _, parts in self.parts_R if parts), None)
        if example is None:  # nobody needs a tail of this rank
            return
        sum_P2gK = example.new_zeros(plan.shared.tokens, *example.shape[1:])
        for chunks, parts in self.parts_R:
            if parts:
                torch._foreach_add_([sum_P2gK[plan.shared.rows(chunk)] for chunk in chunks], parts)
        for chunk in plan.shared.chunks:
            for which in (1, 2):
                part = sum_P2gK[plan.shared.rows(chunk), which - 1]
                total.add(which, plan.tail_rows(chunk), self.heads, part)


def _query_heads(heads: slice, q_SHK: Tensor, k_SGK: Tensor) -> slice:
    """Heads of q that read these key/value heads."""
    repeat = q_SHK.shape[1] // k_SGK.shape[1]
    return slice(heads.start * repeat, heads.stop * repeat)


def _early_bytes(plan: TailPlan, q_SHK: Tensor, k_SGK: Tensor) -> int:
    """Bytes of the rectangles' results, if all are kept until the local part is there."""
    rows = sum(r.rows.stop - r.rows.start for r in plan.rectangles)
    queries = rows * q_SHK.shape[1] * q_SHK.shape[2] * q_SHK.dtype.itemsize
    return queries + plan.shared.tokens * 2 * k_SGK.shape[1] * k_SGK.shape[2] * wide(k_SGK.dtype).itemsize

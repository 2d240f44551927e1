"""Lightning attention over a row whose chunks lie on several ranks (LASP+: MiniMax-01 section 3.2.2, with the decay and
the documents that the paper leaves out).

Every rank computes what each of its chunks leaves behind on its own, one all-gather brings the M states together, and
each chunk goes on from the decayed sum of those before it, as far as its document reaches. Backward is the same from
the end, for the gradients of the states. Forward hides the all-gather behind what is computed until the result is asked
for, backward behind dq, which needs no state from a later chunk.

Legend: S tokens of this rank, H heads, K head dimension, X = 3 K, M chunks of the row, N chunks of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmkernels.lightning import chunks_backward, chunks_forward, lightning_segment_states, states_between
from mmtrain.parallel.collectives import start_gather_into
from mmtrain.parallel.context.row_shard import ContextPacking


def begin_context_lightning(
    qkv_SHX: Tensor, slopes_H: Tensor, packing: ContextPacking, group: ProcessGroup
) -> Callable[[], Tensor]:
    """Start the all-gather of states, and return what ends the attention with this rank's output, [S, H, K].

    Args:
        qkv_SHX: projection of this rank's tokens: for each head K columns of q, of k and of v, before their SiLU.
        slopes_H: decay slopes, fp32 [H].
        packing: this rank's part of the row.
        group: the ranks that share it.
    """
    with torch.no_grad():
        act_SHX = F.silu(qkv_SHX)
        _, k, v = _thirds(act_SHX)
        states = _Gathered.start(k, v, slopes_H, packing, group, reverse=False)
    return lambda: _ContextLightning.apply(qkv_SHX, act_SHX, slopes_H, packing, group, states)


class _Gathered:
    """States of all chunks of a row, on their way from the ranks that computed them."""

    def __init__(self, states_MHKK: Tensor, work: dist.Work | None, slopes_H: Tensor, packing: ContextPacking) -> None:
        self._states_MHKK, self._work, self._slopes_H, self._packing = states_MHKK, work, slopes_H, packing

    @staticmethod
    def start(
        b_1SHK: Tensor, c_1SHK: Tensor, slopes_H: Tensor, packing: ContextPacking, group: ProcessGroup, reverse: bool
    ) -> _Gathered:
        """Compute this rank's states, sums of b^T c, and send them to all."""
        shard, (heads, width) = packing.shard, b_1SHK.shape[2:]
        dtype = torch.promote_types(b_1SHK.dtype, torch.float32)
        if not shard.crosses:  # as all ranks know
            return _Gathered(b_1SHK.new_zeros(0, heads, width, width, dtype=dtype), None, slopes_H, packing)
        mine_NHKK = lightning_segment_states(
            b_1SHK, c_1SHK, slopes_H, segments=len(shard.chunks), cu_seqlens=packing.cu_seqlens, reverse=reverse
        )[0]
        states_MHKK = mine_NHKK.new_empty(shard.num_chunks, heads, width, width)
        return _Gathered(states_MHKK, start_gather_into(states_MHKK, mine_NHKK, group), slopes_H, packing)

    def between(self, reverse: bool) -> Tensor:
        """Wait for them, and return the states that enter this rank's chunks, [N, H, K, K] (see `states_between`)."""
        shard = self._packing.shard
        if self._work is None:
            return self._states_MHKK.new_zeros(len(shard.chunks), *self._states_MHKK.shape[1:])
        self._work.wait()
        states_MHKK, self._states_MHKK = self._states_MHKK, self._states_MHKK[:0]
        return states_between(states_MHKK, self._slopes_H, self._packing.chunk_plan, reverse=reverse)


class _ContextLightning(torch.autograd.Function):
    """Saves the projection, its SiLU and the states before this rank's chunks."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, qkv_SHX: Tensor, act_SHX: Tensor, slopes_H: Tensor, packing: ContextPacking,
        group: ProcessGroup, states: _Gathered,
    ) -> Tensor:  # fmt: skip
        before_NHKK = states.between(reverse=False)
        o_1SHK, saved = chunks_forward(*_thirds(act_SHX), slopes_H, packing.cu_seqlens, before_NHKK)
        ctx.packing, ctx.group = packing, group
        ctx.save_for_backward(qkv_SHX, act_SHX, slopes_H, before_NHKK, *saved)
        return o_1SHK[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_SHK: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv_SHX, act_SHX, slopes_H, before_NHKK, *saved = ctx.saved_tensors
        (q, k, v), do_1SHK = _thirds(act_SHX), do_SHK[None]
        gradients = _Gathered.start(q, do_1SHK, slopes_H, ctx.packing, ctx.group, reverse=True)
        grad_SHX = torch.empty_like(qkv_SHX)
        chunks_backward(
            q, k, v, do_1SHK, slopes_H, ctx.packing.cu_seqlens, before_NHKK, lambda: gradients.between(reverse=True),
            tuple(saved), _thirds(grad_SHX), raw=_thirds(qkv_SHX),
        )  # fmt: skip
        return grad_SHX, None, None, None, None, None


def _thirds(x_SHX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x_SHX[None].chunk(3, dim=-1)
    return q, k, v

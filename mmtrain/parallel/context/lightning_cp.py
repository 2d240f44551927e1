"""Lightning attention over a row whose chunks lie on several ranks (LASP+: MiniMax-01 section 3.2.2, with the decay and
the documents that the paper leaves out).

Every rank computes what each of its chunks leaves behind on its own, one exchange brings the M states together, and
each chunk goes on from the decayed sum of those before it, as far as its document reaches. Backward is the same from
the end, for the gradients of the states. Forward hides the exchange behind what is computed until the result is asked
for, backward behind dq, which needs no state from a later chunk.

Legend: S tokens of this rank, H heads, K head dimension, X = 3 K, M chunks of the row, N chunks of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.lightning import chunks_backward, chunks_forward, lightning_segment_states, states_between
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.context.state_exchange import StateExchange


def begin_context_lightning(
    qkv_SHX: Tensor, slopes_H: Tensor, packing: ContextPacking, exchange: StateExchange
) -> Callable[[], Tensor]:
    """Start the exchange of states, and return what ends the attention with this rank's output, [S, H, K].

    Args:
        qkv_SHX: projection of this rank's tokens: for each head K columns of q, of k and of v, before their SiLU.
        slopes_H: decay slopes, fp32 [H].
        packing: this rank's part of the row.
        exchange: of the ranks that share it.
    """
    with torch.no_grad():
        act_SHX = F.silu(qkv_SHX)
        _, k, v = _thirds(act_SHX)
        states = _Gathered.start(k, v, slopes_H, packing, exchange, reverse=False)
    return lambda: _ContextLightning.apply(qkv_SHX, act_SHX, slopes_H, packing, exchange, states)


class _Gathered:
    """States of all chunks of a row, on their way from the ranks that computed them.

    Args:
        arrive: waits for them, [M, H, K, K]; None where no document lies in two chunks, and all are zero.
        slopes_H: decay slopes.
        packing: this rank's part of the row.
    """

    def __init__(self, arrive: Callable[[], Tensor] | None, slopes_H: Tensor, packing: ContextPacking) -> None:
        self._arrive, self._slopes_H, self._packing = arrive, slopes_H, packing

    @staticmethod
    def start(
        b_1SHK: Tensor, c_1SHK: Tensor, slopes_H: Tensor, packing: ContextPacking, exchange: StateExchange,
        reverse: bool,
    ) -> _Gathered:  # fmt: skip
        """Compute this rank's states, sums of b^T c, and send them to all."""
        shard = packing.shard
        if not shard.crosses:  # as all ranks know
            return _Gathered(None, slopes_H, packing)
        mine_NHKK = lightning_segment_states(
            b_1SHK, c_1SHK, slopes_H, segments=len(shard.chunks), cu_seqlens=packing.cu_seqlens, reverse=reverse
        )[0]
        return _Gathered(exchange.start(mine_NHKK), slopes_H, packing)

    def between(self, like_1SHK: Tensor, reverse: bool) -> Tensor:
        """Wait for them, and return the states that enter this rank's chunks, [N, H, K, K] (see `states_between`).

        Args:
            like_1SHK: one of the factors of states.
            reverse: as they were started.
        """
        if self._arrive is None:
            chunks, (heads, width) = len(self._packing.shard.chunks), like_1SHK.shape[2:]
            dtype = torch.promote_types(like_1SHK.dtype, torch.float32)
            return like_1SHK.new_zeros(chunks, heads, width, width, dtype=dtype)
        arrive, self._arrive = self._arrive, None
        return states_between(arrive(), self._slopes_H, self._packing.chunk_plan, reverse=reverse)


class _ContextLightning(torch.autograd.Function):
    """Saves the projection, its SiLU and the states before this rank's chunks."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, qkv_SHX: Tensor, act_SHX: Tensor, slopes_H: Tensor, packing: ContextPacking,
        exchange: StateExchange, states: _Gathered,
    ) -> Tensor:  # fmt: skip
        q, k, v = _thirds(act_SHX)
        before_NHKK = states.between(k, reverse=False)
        o_1SHK, saved = chunks_forward(q, k, v, slopes_H, packing.cu_seqlens, before_NHKK)
        ctx.packing, ctx.exchange = packing, exchange
        ctx.save_for_backward(qkv_SHX, act_SHX, slopes_H, before_NHKK, *saved)
        return o_1SHK[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_SHK: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv_SHX, act_SHX, slopes_H, before_NHKK, *saved = ctx.saved_tensors
        (q, k, v), do_1SHK = _thirds(act_SHX), do_SHK[None]
        gradients = _Gathered.start(q, do_1SHK, slopes_H, ctx.packing, ctx.exchange, reverse=True)
        grad_SHX = torch.empty_like(qkv_SHX)
        chunks_backward(
            q, k, v, do_1SHK, slopes_H, ctx.packing.cu_seqlens, before_NHKK, lambda: gradients.between(q, reverse=True),
            tuple(saved), _thirds(grad_SHX), raw=_thirds(qkv_SHX),
        )  # fmt: skip
        return grad_SHX, None, None, None, None, None


def _thirds(x_SHX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x_SHX[None].chunk(3, dim=-1)
    return q, k, v

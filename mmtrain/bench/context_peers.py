"""Other ways to share a packed row, built of torch's collectives and this repository's kernels, for comparison.

* Heads to tokens (DeepSpeed's Ulysses; lightning layers by the same in AReaL and Megatron-LM): an all-to-all gives each
  rank all tokens of a share of the heads, and another brings its result back. Heads must be divisible.
* Plain all-gather: every rank brings keys and values of the whole row, before it computes anything.

In both a rank has neighbouring tokens of the row, in one chunk.

Legend: T tokens of the row, S of a rank, N ranks, H heads, G key/value heads, h and g those of a rank, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from mmkernels.lightning import silu_lightning_attention
from mmkernels.softmax import (
    softmax_attention,
    softmax_attention_with_lse,
    softmax_backward,
    softmax_forward,
    softmax_merge,
    softmax_packed_backward,
)
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.collectives import scatter_sum_into, start_gather_into
from mmtrain.parallel.context.row_shard import ContextPacking


@dataclass(frozen=True)
class HeadExchange:
    """Both kinds of attention with all tokens of a share of the heads on each rank (an `AttentionCall`).

    Its packings are those of whole rows.
    """

    group: ProcessGroup

    def begin_lightning(self, qkv_SHX: Tensor, slopes_H: Tensor, packing: Packing) -> Callable[[], Tensor]:
        """Compute the attention of this rank's tokens; nothing is left to be ended."""
        count, rank = self.group.size(), self.group.rank()
        qkv_ThX = self._to_tokens(qkv_SHX)
        slopes_h = slopes_H.view(count, -1)[rank].contiguous()
        o_ThK = silu_lightning_attention(qkv_ThX[None], slopes_h, cu_seqlens=packing.cu_seqlens).squeeze(0)
        o_SHK = self._to_heads(o_ThK)
        return lambda: o_SHK

    def softmax(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: Packing) -> Tensor:
        """Return the attention of this rank's tokens; one all-to-all brings q, k and v."""
        count = self.group.size()
        qkv_TjK = self._to_tokens(q_SHK, k_SGK, v_SGK)
        heads = [x.shape[1] // count for x in (q_SHK, k_SGK, v_SGK)]
        o_ThK = softmax_attention(*qkv_TjK.split(heads, dim=1), packing.cu_seqlens, packing.lengths)
        return self._to_heads(o_ThK)

    def _to_tokens(self, *parts_SHK: Tensor) -> Tensor:
        """All tokens of this rank's heads of each part, beside each other."""
        count = self.group.size()
        for x_SHK in parts_SHK:
            if x_SHK.shape[1] % count:
                raise ValueError(f"{x_SHK.shape[1]} heads cannot be shared by {count} ranks")
        by_rank = [x.reshape(x.shape[0], count, -1, x.shape[2]).transpose(0, 1) for x in parts_SHK]
        return _AllToAll.apply(torch.cat(by_rank, dim=2), self.group).flatten(0, 1)

    def _to_heads(self, o_ThK: Tensor) -> Tensor:
        """All heads of this rank's tokens."""
        o_NShK = _AllToAll.apply(o_ThK.unflatten(0, (self.group.size(), -1)), self.group)
        return o_NShK.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Parts along dim 0 go to the ranks, and theirs come."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return _exchange(dy, ctx.group), None


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def plain_gather(q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: ContextPacking, group: ProcessGroup) -> Tensor:
    """Softmax attention where each rank has all keys and values of the row; returns o_SHK.

    Nothing is computed while they come. Of what came a rank uses what its documents need.

    Args:
        q_SHK: queries of this rank's tokens.
        k_SGK: their keys.
        v_SGK: their values.
        packing: of a row in one chunk a rank, in the order of the ranks.
        group: the ranks.
    """
    return _PlainGather.apply(q_SHK, k_SGK, v_SGK, packing, group)


class _PlainGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: ContextPacking, group: ProcessGroup
    ) -> Tensor:
        q_SHK, k_SGK, v_SGK = (x.detach() for x in (q_SHK, k_SGK, v_SGK))
        kv_S2GK = torch.stack([k_SGK, v_SGK], dim=1)
        kv_T2GK = kv_S2GK.new_empty(packing.row_tokens, *kv_S2GK.shape[1:])
        start_gather_into(kv_T2GK, kv_S2GK, group).wait()
        o_SHK, lse_HS = softmax_attention_with_lse(q_SHK, k_SGK, v_SGK, packing.cu_seqlens, packing.lengths)
        head, earlier = _earlier(packing)
        if head:
            part = softmax_forward(q_SHK[:head], kv_T2GK[earlier, 0], kv_T2GK[earlier, 1], causal=False)
            softmax_merge(o_SHK[:head], lse_HS[:, :head], *part)
        ctx.save_for_backward(q_SHK, kv_T2GK, o_SHK, lse_HS)
        ctx.packing, ctx.group = packing, group
        return o_SHK

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_SHK: Tensor) -> tuple[Tensor | None, ...]:
        (q_SHK, kv_T2GK, o_SHK, lse_HS), packing = ctx.saved_tensors, ctx.packing
        tokens, do_SHK = q_SHK.shape[0], do_SHK.contiguous()
        mine = slice(packing.shard.rank * tokens, (packing.shard.rank + 1) * tokens)
        k, v = kv_T2GK[mine].unbind(1)
        dq, dk, dv = softmax_packed_backward(do_SHK, q_SHK, k, v, o_SHK, lse_HS, packing.cu_seqlens, packing.lengths)
        dkv_T2GK = torch.zeros_like(kv_T2GK)
        dkv_T2GK[mine, 0], dkv_T2GK[mine, 1] = dk, dv
        head, earlier = _earlier(packing)
        if head:
            k, v = kv_T2GK[earlier].unbind(1)
            part = softmax_backward(do_SHK[:head], q_SHK[:head], k, v, o_SHK[:head], lse_HS[:, :head], causal=False)
            dq[:head] += part[0]
            dkv_T2GK[earlier, 0], dkv_T2GK[earlier, 1] = part[1:]
        dkv_S2GK = torch.empty_like(dkv_T2GK[mine])
        scatter_sum_into(dkv_S2GK, dkv_T2GK, ctx.group)
        return dq, *dkv_S2GK.unbind(1), None, None


def _earlier(packing: ContextPacking) -> tuple[int, slice]:
    """Tokens here of the document that began on an earlier rank, and where in the row its keys there lie."""
    shard = packing.shard
    return int(shard.head_M[shard.rank]), slice(int(shard.start_M[shard.rank]), shard.rank * shard.chunk_tokens)

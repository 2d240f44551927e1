"""Stand-in until the ring is merged: gathers the whole row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.parallel.collectives import gather_rows
from mmtrain.parallel.context.row_shard import ContextPacking


def context_softmax(
    q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, packing: ContextPacking, group: ProcessGroup, way: str
) -> Tensor:
    """This rank's part of the attention, from keys and values of the whole row."""
    shard = packing.shard

    def row(x: Tensor) -> Tensor:
        return (
            gather_rows(x, group)
            .unflatten(0, (shard.num_chunks, shard.chunk_tokens))
            .index_select(0, packing.place_M)
            .flatten(0, 1)
        )

    k, v = row(k_SGK), row(v_SGK)
    rep = q_SHK.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
    doc = torch.bucketize(torch.arange(k.shape[0]), packing.whole.cu_seqlens[1:].long(), right=True)
    ok = (doc[packing.index_S][:, None] == doc[None]) & (packing.index_S[:, None] >= torch.arange(k.shape[0])[None])
    s = torch.einsum("qhd,khd->hqk", q_SHK, k) * q_SHK.shape[2] ** -0.5
    return torch.einsum("hqk,khd->qhd", s.masked_fill(~ok, -torch.inf).softmax(-1), v)

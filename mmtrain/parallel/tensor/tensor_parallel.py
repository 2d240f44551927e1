"""Tensor parallelism with sequence parallelism (Megatron-LM's scheme), applied to a whole model.

Between mixers and feed-forwards a rank holds T/W consecutive tokens. A mixer gathers all T, works on its own heads, and
its output projection, of which a rank has the columns of its heads, sums over ranks and scatters the tokens in one
reduce-scatter. Routed experts take the rank's own tokens: their parallelism is another (`mmtrain.parallel.expert`).

Legend: T tokens of a micro-batch, W ranks, S = T / W tokens of this rank, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from mmtrain.model.ffn import SwiGLU
from mmtrain.model.mixers.mixer import HeadShard
from mmtrain.model.mixers.registry import Placement
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.model.sequence import SequenceRegion
from mmtrain.parallel.collectives import gather_rows, scatter_sum_rows, sum_in_place
from mmtrain.parallel.dtensor_params import shard_parameter
from mmtrain.parallel.tensor.vocab_parallel import (
    VocabParallelDocuments,
    VocabParallelLookup,
    vocab_parallel_cross_entropy,
)
from mmtrain.parallel.tensor.vocab_score import VocabParallelScore
from mmtrain.parallel.vision.apply import replicate_eyes

PLACEMENTS = {
    Placement.ROWS: (Shard(0),),
    Placement.COLUMNS: (Shard(1),),
    Placement.REPLICATED: (Replicate(),),
}
BLOCK_NORMS = {"input_norm.weight": Placement.REPLICATED, "post_attention_norm.weight": Placement.REPLICATED}
SWIGLU = {"w13_2FD": Placement.COLUMNS, "w2_DF": Placement.COLUMNS}
MOE = {"router.weight": Placement.REPLICATED}
SHARED_EXPERT = {"coefficient.weight": Placement.REPLICATED}
ENDS = {"norm.weight": Placement.REPLICATED, "embed_tokens.weight": Placement.ROWS, "lm_head.weight": Placement.ROWS}


class SequenceParallelRegion:
    """Tokens are shared out over the ranks of a group, which each work on all of them with a part of the weights."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather_from(self, x_SD: Tensor) -> Tensor:
        """All-gather the tokens, [T, D]; backward reduce-scatters their gradients."""
        return gather_rows(x_SD, self.group)

    def reduce_scatter_to(self, partial_TD: Tensor) -> Tensor:
        """Reduce-scatter partial results to this rank's tokens, [T / W, D]; backward all-gathers their gradients."""
        return scatter_sum_rows(partial_TD, self.group)


def apply_tensor_parallel(model: HybridLM, mesh: DeviceMesh) -> None:
    """Place every dense parameter of a (meta) model on `mesh`, and make its modules work on this rank's part.

    Routers still take this rank's tokens for all of their micro-batch.
    """
    group = mesh.get_group()
    place_over_tp(model, mesh, SequenceParallelRegion(group))
    first = first_row(model.config.vocab_size, mesh)
    model.embed_tokens.lookup = VocabParallelLookup(first, group)
    model.token_loss = partial(_loss, first=first, group=group)
    model.label_score = VocabParallelScore(first, group)
    model.document_score = VocabParallelDocuments(first, group)


def place_over_tp(model: HybridLM, mesh: DeviceMesh, region: SequenceRegion) -> None:
    """Place every dense parameter of a (meta) model on `mesh`; mixers and feed-forwards work on this rank's part.

    Args:
        region: brings tokens to them, and sums what they give over ranks.
    """
    group, tp = mesh.get_group(), mesh.size()
    heads = HeadShard(mesh.get_local_rank(), tp, partial(sum_in_place, group=group))
    for block in model.layers:
        _place(block, BLOCK_NORMS, mesh)
        _place(block.mixer, block.spec.placements(model.config, tp), mesh)
        block.mixer.split_heads(heads)
        block.sequence = region
        if isinstance(block.ffn, MoE):
            _moe(block.ffn, mesh, region)
        else:
            _feed_forward(block.ffn, mesh, region)
    _place(model, ENDS, mesh)
    replicate_eyes(model, mesh)


def _loss(
    x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, *, first: int, group: dist.ProcessGroup
) -> Tensor:
    return vocab_parallel_cross_entropy(x_SD, weight_VD, labels_T, first, chunk_tokens, group)


def first_row(rows: int, mesh: DeviceMesh) -> int:
    """Return the first row of this rank's shard, as DTensor cuts them: all of the same size but the last."""
    return min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())


def _place(module: nn.Module, placements: Mapping[str, Placement], mesh: DeviceMesh) -> None:
    for name, placement in placements.items():
        shard_parameter(module, name, mesh, PLACEMENTS[placement])


def _feed_forward(ffn: SwiGLU, mesh: DeviceMesh, region: SequenceRegion) -> None:
    _place(ffn, SWIGLU, mesh)
    ffn.sequence = region


def _moe(moe: MoE, mesh: DeviceMesh, region: SequenceRegion) -> None:
    """Place the router and the shared expert; routed experts are placed by expert parallelism."""
    _place(moe, MOE, mesh)
    if moe.shared is not None:
        _place(moe.shared, SHARED_EXPERT, mesh)
        _feed_forward(moe.shared.mlp, mesh, region)

"""Tensor parallelism with sequence parallelism (Megatron-LM's scheme), applied to a whole model.

Between mixers and feed-forwards a rank holds T/W consecutive tokens. A mixer gathers all T, works on its own heads, and
its output projection, of which a rank has the columns of its heads, sums over ranks and scatters the tokens in one
reduce-scatter. Routed experts take the rank's own tokens: their parallelism is another (`expert.py`).

Legend: T tokens of a micro-batch, W ranks, D model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from mmtrain.config import ModelConfig
from mmtrain.model.block import Block
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.mixers.lightning import LightningAttention
from mmtrain.model.mixers.softmax import SoftmaxAttention
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.parallel.collectives import gather_rows, scatter_sum_rows, sum_in_place
from mmtrain.parallel.dtensor_params import place
from mmtrain.parallel.tensor.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_embedding

ROWS, COLUMNS, WHOLE = (Shard(0),), (Shard(1),), (Replicate(),)


def apply_tensor_parallel(model: HybridLM, mesh: DeviceMesh) -> None:
    """Place every dense parameter of a (meta) model on `mesh`, and make its modules work on this rank's part."""
    group = mesh.get_group()
    for block in model.layers:
        _norm(block.input_norm, mesh)
        _norm(block.post_attention_norm, mesh)
        _mixer(block, model.config, mesh)
        if isinstance(block.ffn, MoE):
            _moe(block.ffn, mesh)
        else:
            _feed_forward(block.ffn, mesh)
    _norm(model.norm, mesh)
    first = _first_row(model.config.vocab_size, mesh)
    for table in (model.embed_tokens, model.lm_head):
        place(table, "weight", mesh, ROWS)
    embedding = model.embed_tokens
    embedding.forward = lambda tokens_T: vocab_parallel_embedding(tokens_T, embedding.weight, first, group)
    model.token_loss = partial(_loss, first=first, group=group)


def _loss(
    x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int, *, first: int, group: dist.ProcessGroup
) -> Tensor:
    return vocab_parallel_cross_entropy(x_SD, weight_VD, labels_T, first, chunk_tokens, group)


def _first_row(rows: int, mesh: DeviceMesh) -> int:
    """First row of this rank's shard, as DTensor cuts them: all of the same size but the last."""
    return min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())


def _norm(norm: nn.Module, mesh: DeviceMesh) -> None:
    place(norm, "weight", mesh, WHOLE)


def _mixer(block: Block, config: ModelConfig, mesh: DeviceMesh) -> None:
    mixer, group = block.mixer, mesh.get_group()
    mixer.register_forward_pre_hook(partial(_gather_first, group=group))
    if isinstance(mixer, LightningAttention):
        _lightning(mixer, mesh)
        out = mixer.out_proj
    else:
        assert isinstance(mixer, SoftmaxAttention)
        _softmax(mixer, config, mesh)
        out = mixer.o_proj
    place(out, "weight", mesh, COLUMNS)
    out.register_forward_hook(partial(_scatter, group=group))


def _lightning(mixer: LightningAttention, mesh: DeviceMesh) -> None:
    """Slopes belong to global heads; the norm's mean square is over all heads of all ranks."""
    heads, whole, group = mixer.num_heads // mesh.size(), mixer.norm.weight.numel(), mesh.get_group()
    mixer.take_heads(mesh.get_local_rank() * heads, heads)
    mixer.norm_over = {"width": whole, "reduce": lambda x_T: sum_in_place(x_T, group)}
    for projection in (mixer.qkv_proj, mixer.output_gate):
        place(projection, "weight", mesh, ROWS)
    place(mixer.norm, "weight", mesh, ROWS)


def _softmax(mixer: SoftmaxAttention, config: ModelConfig, mesh: DeviceMesh) -> None:
    place(mixer.q_proj, "weight", mesh, ROWS)
    for projection in (mixer.k_proj, mixer.v_proj):
        if config.num_kv_heads % mesh.size() == 0:
            place(projection, "weight", mesh, ROWS)
        else:  # fewer than ranks: every rank has all of them, and uses the one that its query heads share
            head = mesh.get_local_rank() * config.num_kv_heads // mesh.size()
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            place(projection, "weight", mesh, WHOLE, view=lambda weight, rows=rows: weight[rows])


def _feed_forward(ffn: SwiGLU, mesh: DeviceMesh) -> None:
    place(ffn, "w13_2FD", mesh, COLUMNS)
    place(ffn, "w2_DF", mesh, COLUMNS)
    ffn.register_forward_pre_hook(partial(_gather_first, group=mesh.get_group()))
    ffn.register_forward_hook(partial(_scatter, group=mesh.get_group()))


def _moe(moe: MoE, mesh: DeviceMesh) -> None:
    place(moe.router, "weight", mesh, WHOLE)
    if moe.shared is not None:
        _feed_forward(moe.shared.mlp, mesh)
        place(moe.shared.coefficient, "weight", mesh, WHOLE)


def _gather_first(_: nn.Module, args: tuple[Any, ...], group: dist.ProcessGroup) -> tuple[Any, ...]:
    return gather_rows(args[0], group), *args[1:]


def _scatter(_: nn.Module, __: tuple[Any, ...], out_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    return scatter_sum_rows(out_TD, group)

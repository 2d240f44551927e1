"""The one entry point that lays a model over processes."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM
from mmtrain.model.moe import MoE
from mmtrain.parallel.mesh import ParallelContext


def apply_parallel(
    model: HybridLM,
    context: ParallelContext,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    host_parameters: bool = False,
) -> nn.Module:
    """Turn every parameter of a (meta) model into a DTensor on the mesh, sharded over data parallelism by FSDP2.

    Master weights stay fp32; blocks compute in `compute_dtype`, routers in fp32; gradients are reduced in fp32 as the
    mean over ranks. The model has no memory afterwards if it had none before.

    Args:
        host_parameters: keep sharded parameters and gradients in host memory, for an optimizer that runs there.
    """
    # Inputs are not cast: hidden states come in compute_dtype already, and RoPE tables must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if host_parameters and context.device.type == "cuda" else OffloadPolicy()
    shard = partial(fully_shard, mesh=context.mesh["dp"], offload_policy=offload)
    reshard = config.reshard_after_forward
    for block in model.layers:
        block.recompute = config.activation_checkpoint
        if isinstance(block.ffn, MoE):
            shard(block.ffn.router, mp_policy=exact, reshard_after_forward=reshard)
        shard(block, mp_policy=policy, reshard_after_forward=reshard)
    shard(model, mp_policy=policy, reshard_after_forward=False)
    return model


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Reduce gradients over ranks in the next backward, or keep them on this rank until one that does."""
    model.set_requires_gradient_sync(sync)

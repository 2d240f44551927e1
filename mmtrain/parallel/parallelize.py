"""The one entry point that lays a model over processes."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.parallel.expert.exchange import build_exchange
from mmtrain.parallel.expert.expert_parallel import apply_expert_parallel
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline.schedule import Pipeline
from mmtrain.parallel.pipeline.split import take_stages
from mmtrain.parallel.routing import RoutedWhole, apply_routing
from mmtrain.parallel.tensor.tensor_parallel import apply_tensor_parallel


def apply_parallel(
    model: HybridLM,
    context: ParallelContext,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    host_parameters: bool = False,
    seq_len: int = 8192,
) -> nn.Module:
    """Turn every parameter of a (meta) model into a DTensor on the meshes of `context`, sharded by FSDP2.

    Dense parameters are split over tp, and sharded over dp and cp; experts are split over ep and etp, and sharded over
    edp. Master weights stay fp32; blocks compute in `compute_dtype`, routers in fp32; gradients are reduced in fp32, as
    the mean over replicas of the model (those of experts too, whose ranks each saw the tokens of several replicas). The
    model has no memory afterwards if it had none before.

    With a pipeline the model loses the parts that other ranks have, and its `pipeline` runs what is left.

    Args:
        host_parameters: keep sharded parameters and gradients in host memory, for an optimizer that runs there.
        seq_len: length of sequence at which the stages of a pipeline cost about the same.
    """
    layout = context.layout
    if layout.tp > 1:
        apply_tensor_parallel(model, context.dense["tp"])
    if layout.ep * layout.etp > 1:
        axes, tensor = context.expert["ep", "etp"], context.dense["tp"].get_group()
        groups = 1 if isinstance(config.token_groups, str) else config.token_groups  # "auto" measures later
        fixed = model.config.capacity_factor is not None and not config.global_router  # places that others know
        exchange = config.exchange if fixed else "collectives"
        apply_expert_parallel(model, axes, build_exchange(axes, tensor, context.device, groups, exchange))
        for block in model.layers:
            if layout.tp > 1:
                block.ffn.router.tokens = RoutedWhole(tensor)
    apply_routing(model, context, config)
    stages = [model]
    if layout.pp > 1:  # after the model was placed, which asks for all of its parts
        rank = context.dense["pp"].get_local_rank()
        by_number = take_stages(model, rank, layout.pp, config.pp_chunks, seq_len)
        model.pipeline = Pipeline(model, by_number, context, config, compute_dtype)
        stages = list(by_number.values())
    _shard(model, stages, context, config, compute_dtype, host_parameters)
    return model


def _shard(
    model: HybridLM,
    stages: list[HybridLM],
    context: ParallelContext,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    host_parameters: bool,
) -> None:
    """FSDP2 over the replicas of each parameter; `stages` are the modules whose forward is called."""
    layout = context.layout
    # Inputs are not cast: hidden states come in compute_dtype already, and RoPE tables must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if host_parameters and context.device.type == "cuda" else OffloadPolicy()
    shard = partial(fully_shard, offload_policy=offload)
    dense = {"mesh": context.replicas, "shard_placement_fn": partial(_free_dimension, ranks=context.replicas.size())}
    expert = {"mesh": context.expert["edp"], "shard_placement_fn": partial(_free_dimension, ranks=layout.edp)}
    # Weight gradients that are computed apart look for the parameters as forward used them.
    reshard = config.reshard_after_forward and not (layout.pp > 1 and config.pp_schedule == "zero_bubble")
    for block in model.layers:
        block.recompute = config.activation_checkpoint
        if isinstance(block.ffn, MoE):
            shard(block.ffn.router, mp_policy=exact, reshard_after_forward=reshard, **dense)
            if layout.tp * layout.ep * layout.etp > 1:  # other ranks hold copies of an expert than of the rest
                experts = shard(block.ffn.experts, mp_policy=policy, reshard_after_forward=reshard, **expert)
                experts.set_gradient_divide_factor(layout.replicas)
                if context.device.type == "cpu" and layout.edp > 1:  # gloo has no other reduction
                    experts.set_force_sum_reduction_for_comms(True)
        shard(block, mp_policy=policy, reshard_after_forward=reshard, **dense)
    for stage in stages:
        shard(stage, mp_policy=policy, reshard_after_forward=False, **dense)


def _free_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Where FSDP cuts a parameter that is split already: along the first other dimension that it divides evenly."""
    if not isinstance(parameter, DTensor):
        return None
    taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    free = [dim for dim, size in enumerate(parameter.shape) if dim not in taken and size % ranks == 0 and size > 1]
    return Shard(free[0]) if taken and free else None

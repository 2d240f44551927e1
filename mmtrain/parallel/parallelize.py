"""The one entry point that lays a model over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mmtrain.config import ParallelConfig
from mmtrain.model.block import Block
from mmtrain.model.host_inputs import HostInputs
from mmtrain.model.mixers.registry import LIGHTNING, SOFTMAX
from mmtrain.model.model import HybridLM
from mmtrain.parallel.caption_pairs import share_pairs
from mmtrain.parallel.compute_weights import ComputeWeights
from mmtrain.parallel.context.context_parallel import apply_context_parallel
from mmtrain.parallel.expert.exchange import ExpertExchange, build_exchange
from mmtrain.parallel.expert.expert_parallel import apply_expert_parallel
from mmtrain.parallel.fsdp import ShardedWeights, apply_fsdp
from mmtrain.parallel.graphs.recorded_model import RecordedModel
from mmtrain.parallel.layout import MOST_GRAPH_TOKENS, keeps_whole_weights, records_graphs
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.pipeline.micro_batch import PlainModel, Schedule, SingleStage, WeightsInUse
from mmtrain.parallel.pipeline.schedule import Pipeline
from mmtrain.parallel.pipeline.split import split_layers, split_stages
from mmtrain.parallel.routing import apply_routing
from mmtrain.parallel.tensor.tensor_parallel import apply_tensor_parallel
from mmtrain.parallel.units import UnitWatch
from mmtrain.parallel.vision.apply import share_images


def apply_parallel(
    model: HybridLM,
    context: ParallelContext,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    host_parameters: bool = False,
    seq_len: int = 8192,
    stages: Sequence[Sequence[int]] = (),
) -> ParallelModel:
    """Turn every parameter of a (meta) model into a DTensor on the meshes of `context`. Collective.

    Dense parameters are split over tp, and sharded over dp and cp; experts are split over ep and etp, and sharded over
    edp. Master weights stay fp32; blocks compute in `compute_dtype`, routers in fp32; gradients are reduced in fp32, as
    the mean over replicas of the model (those of experts too, whose ranks each saw the tokens of several replicas). The
    model has no memory afterwards if it had none before. With a pipeline it loses the layers that other ranks have.

    Args:
        host_parameters: keep sharded parameters and gradients in host memory, for an optimizer that runs there.
        seq_len: length of sequence at which the stages of a pipeline cost about the same, where `stages` are not given.
        stages: numbers of the layers of every stage of the pipeline.
    """
    layout = context.layout
    if layout.tp > 1:
        apply_tensor_parallel(model, context.dense["tp"])
    exchange = _share_experts(model, context, config) if layout.ep * layout.etp > 1 else None
    apply_routing(model, context, config)
    share_pairs(model, context)
    states = None
    if layout.cp > 1:
        group = context.dense["cp"].get_group()
        states = apply_context_parallel(model, group, config.cp_softmax, config.cp_states)
    for block in model.layers:
        block.recompute = config.recomputes
        if config.ffn_chunk_tokens is not None:
            block.chunk_feed_forward(config.ffn_chunk_tokens)
        if block.spec is LIGHTNING:
            block.mixer.head_groups = config.lightning_head_groups
        if config.activation_checkpoint == "selective" and block.spec is SOFTMAX:
            block.keep_attention()
    share_images(model, context, config, keeps_whole_weights(layout, config, host_parameters))
    if layout.pp > 1:  # after parameters were placed, which asks for all parts of the model
        rank = context.dense["pp"].get_local_rank()
        layers = stages or split_layers(model.config, layout.pp * config.pp_chunks, seq_len)
        mine = split_stages(model, rank, layout.pp, config.pp_chunks, layers)
        _offload_inputs([block for stage in mine.values() for block in stage.layers], config)
        apply_fsdp(model, mine.values(), context, config, compute_dtype, host_parameters)
        schedule: Schedule = Pipeline(model, mine, context, config, compute_dtype)
    else:
        _offload_inputs(model.layers, config)
        if keeps_whole_weights(layout, config, host_parameters):
            weights: WeightsInUse = ComputeWeights(model, context, compute_dtype)
            watch: UnitWatch | None = weights.watch
        else:
            apply_fsdp(model, [model], context, config, compute_dtype, host_parameters)
            weights, watch = ShardedWeights(model, config), None
        text = model.config.vision is None  # images are as many as they are: their kernels are not recorded
        recorded = text and context.device.type == "cuda" and records_graphs(layout, config, host_parameters)
        most = None if config.cuda_graphs is True else MOST_GRAPH_TOKENS
        run = RecordedModel(model, most, compute_dtype, watch) if recorded else PlainModel(model)
        schedule = SingleStage(model, weights, run)
    return ParallelModel(model, context, config, schedule, exchange, states, compute_dtype, host_parameters)


def _offload_inputs(blocks: Iterable[Block], config: ParallelConfig) -> None:
    """Let inputs of a rank's blocks, given in the order of forward, go to host memory."""
    host_inputs = HostInputs()
    for number, block in enumerate(blocks):
        block.host_inputs = host_inputs if config.offloads(number) else None


def _share_experts(model: HybridLM, context: ParallelContext, config: ParallelConfig) -> ExpertExchange:
    axes, tp_group = context.expert["ep", "etp"], context.dense["tp"].get_group()
    token_groups = 1 if isinstance(config.token_groups, str) else config.token_groups  # "auto" measures later
    # Slots that others know: rows that several ranks share have none of a rank's own.
    fixed = model.config.capacity_factor is not None and not config.global_router and context.layout.cp == 1
    way = config.exchange if fixed else "collectives"
    exchange = build_exchange(axes, tp_group, context.device, token_groups, way)
    apply_expert_parallel(model, axes, exchange)
    return exchange

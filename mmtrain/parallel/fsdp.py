"""FSDP2 over the replicas of each parameter, and what it keeps on a rank between the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.vision.contrastive_model import ContrastiveModel
from mmtrain.vision.model import VisionLanguageModel

MOST_PADDING = 1.1
"""A first dimension that grows by more when it is padded for all ranks is not the one to cut."""


def apply_fsdp(
    model: HybridLM,
    stages: Iterable[HybridLM],
    context: ParallelContext,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    host_parameters: bool,
) -> None:
    """Shard dense parameters over dp and cp, those of experts over edp.

    Args:
        model: all that this rank has of the model.
        stages: the modules whose forward is called: `model` itself, or pipeline stages that share its layers.
        compute_dtype: dtype of gathered parameters; routers' are fp32, and gradients are reduced in fp32.
        host_parameters: keep sharded parameters and gradients in host memory.
    """
    layout = context.layout
    # Inputs are not cast: hidden states come in compute_dtype already, and RoPE tables must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if host_parameters and context.device.type == "cuda" else OffloadPolicy()
    shard = partial(fully_shard, offload_policy=offload)
    dense = {"mesh": context.replicas, "shard_placement_fn": partial(free_dimension, ranks=context.replicas.size())}
    expert = {"mesh": context.expert["edp"], "shard_placement_fn": partial(free_dimension, ranks=layout.edp)}
    # Weight gradients that are computed apart look for the parameters as forward used them.
    reshard = config.reshards and not (layout.pp > 1 and config.pp_schedule == "zero_bubble")
    for block in model.layers:
        if isinstance(block.ffn, MoE):
            shard(block.ffn.router, mp_policy=exact, reshard_after_forward=reshard, **dense)
            if layout.tp * layout.ep * layout.etp > 1:  # other ranks hold copies of an expert than of the rest
                experts = shard(block.ffn.experts, mp_policy=policy, reshard_after_forward=reshard, **expert)
                experts.set_gradient_divide_factor(layout.replicas)
                if context.device.type == "cpu" and layout.edp > 1:  # gloo has no other reduction
                    experts.set_force_sum_reduction_for_comms(True)
        shard(block, mp_policy=policy, reshard_after_forward=reshard, **dense)
    # The projector and the newline are of the first stage's own unit. A unit is called once in a forward pass, which
    # the encoder, whose two halves have the exchange between them, is not.
    for part in eye_units(model):
        shard(part, mp_policy=policy, reshard_after_forward=reshard, **dense)
    if isinstance(model, ContrastiveModel):
        shard(model.contrastive, mp_policy=exact, reshard_after_forward=reshard, **dense)
    for stage in stages:
        shard(stage, mp_policy=policy, reshard_after_forward=False, **dense)


def eye_units(model: HybridLM) -> Iterator[nn.Module]:
    """Yield the parts of a model's eyes that are gathered each by itself, the inner ones first; a text model has none.

    They are the layers that images go through, then the rest of the vision transformer, layers that they do not too.
    """
    if isinstance(model, VisionLanguageModel) and model.encoder is not None:
        tower = model.encoder.vision_tower
        yield from tower.used_layers  # FSDP2 fails in a backward pass on a unit that has not run
        yield tower


def free_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Dimension along which FSDP cuts a parameter; None for its own choice, the first.

    A parameter that is split already is cut along the first other dimension that the ranks divide evenly. So is one
    whose first dimension, as the 2 of gate and up, would leave ranks with nothing, and gathered with padding.
    """
    taken: set[int] = set()
    if isinstance(parameter, DTensor):
        taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    first = parameter.shape[0]
    if not taken and -(-first // ranks) * ranks <= MOST_PADDING * first:
        return None
    free = [dim for dim, size in enumerate(parameter.shape) if dim not in taken and size % ranks == 0 and size > 1]
    return Shard(free[0]) if free else None


class ShardedWeights:
    """Weights that FSDP2's hooks gather and reduce while a micro-batch runs."""

    def __init__(self, model: FSDPModule, config: ParallelConfig) -> None:
        self._model, self._config = model, config

    def micro_batch(self, first: bool, last: bool) -> AbstractContextManager[None]:
        """Say whether the micro-batch that is about to run is the step's last, which reduces gradients."""
        set_micro_batch(self._model, self._config, last)
        return nullcontext()

    def forward_only(self) -> AbstractContextManager[None]:
        """Leave all to the hooks."""
        return nullcontext()


def reshard_all(model: nn.Module) -> None:
    """Shard again what forward has gathered, where no backward follows that would."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_micro_batch(model: FSDPModule, config: ParallelConfig, last: bool) -> None:
    """Say what the next backward does with gradients and gathered parameters.

    Gradients are reduced over ranks, or kept whole until the last micro-batch. Parameters that forward keeps gathered
    (ZeRO-1 and 2) stay gathered until then too: they change between steps alone.

    Args:
        last: whether it is the step's last micro-batch.
    """
    model.set_requires_gradient_sync(last or config.sync_every_micro_batch)
    model.set_reshard_after_backward(last or config.reshards)

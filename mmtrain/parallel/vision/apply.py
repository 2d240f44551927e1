"""The eyes of a model laid over processes: whose parameters, and who looks at which tiles."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM
from mmtrain.parallel.dtensor_params import shard_parameter
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.vision.shared_work import Lookers, SharedImageWork
from mmtrain.vision.model import VisionLanguageModel


def replicate_eyes(model: HybridLM, mesh: DeviceMesh) -> None:
    """Give every rank of tensor parallelism all of the eyes' parameters (a meta model's).

    Its ranks look at tiles of their own, and project tokens of their own: gradients are partial sums.
    """
    if isinstance(model, VisionLanguageModel) and model.encoder is not None:
        for name, _ in list(model.encoder.named_parameters()):
            shard_parameter(model.encoder, name, mesh, [Replicate()])


def share_images(model: HybridLM, context: ParallelContext, config: ParallelConfig, whole_weights: bool) -> None:
    """Let ranks share the eyes' work, and recompute its layers as the text model's; nothing for a model of text.

    COLLECTIVE over all ranks: it makes groups.

    Args:
        model: this rank's, before a pipeline cuts it.
        context: the processes.
        config: options of the layout.
        whole_weights: whether ranks have all parameters to compute with, without FSDP's hooks.
    """
    if not isinstance(model, VisionLanguageModel):
        return
    assert model.encoder is not None
    for layer in model.encoder.vision_tower.layers:
        layer.recompute = config.activation_checkpoint == "block"
    if context.layout.world == 1 and whole_weights:
        return
    model.image_work = SharedImageWork(_lookers(context, config.balance_images), always=not whole_weights)


def _lookers(context: ParallelContext, balance: bool) -> Lookers:
    """The ranks that share tiles: all of a pipeline stage, or those alone that have the same rows."""
    layout = context.layout
    names = ("dp", "cp", "tp") if balance else ("cp", "tp")
    names = tuple(name for name in names if getattr(layout, name) > 1) or ("tp",)
    mesh = context.dense[names] if len(names) > 1 else context.dense[names[0]]
    if names == ("dp", "cp"):
        group = context.replicas.get_group()
    else:
        group = (mesh._flatten("_".join(names)) if len(names) > 1 else mesh).get_group()
    host = group
    if context.device.type != "cpu":
        ranks = layout.world // layout.pp if balance else layout.cp * layout.tp
        every = [list(range(first, first + ranks)) for first in range(0, layout.world, ranks)]
        timeout = timedelta(minutes=context.world.timeout_minutes)
        host, _ = dist.new_subgroups_by_enumeration(every, timeout=timeout, backend="gloo")
    return Lookers(group, host, layout.cp * layout.tp)

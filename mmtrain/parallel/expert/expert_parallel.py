"""Placement of the experts over the ranks of ep and etp.

Experts are shared out over the axis ep; each lies in slices of its width F on the ranks of the axis etp, which need not
be those of tensor parallelism (MiniMax-01 section 3: ETP).
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from mmtrain.model.model import HybridLM
from mmtrain.model.moe.experts import Experts
from mmtrain.model.moe.layer import MoE
from mmtrain.parallel.dtensor_params import shard_parameter
from mmtrain.parallel.expert.exchange import ExpertExchange


def apply_expert_parallel(model: HybridLM, mesh: DeviceMesh, exchange: ExpertExchange) -> None:
    """Share the experts of a (meta) model out over a mesh, and let every layer run its own through the exchange.

    Args:
        model: every layer of it has experts.
        mesh: with the axes ep and etp.
        exchange: of the same mesh; all layers share it.
    """
    for block in model.layers:
        assert isinstance(block.ffn, MoE)
        place_experts(block.ffn.experts, mesh)
        block.ffn.experts.call = exchange


def place_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Split the weights of a layer's experts over a mesh with the axes ep, for experts, and etp, for their width."""
    shard_parameter(experts, "w13_E2FD", mesh, (Shard(0), Shard(2)))
    shard_parameter(experts, "w2_EDF", mesh, (Shard(0), Shard(2)))

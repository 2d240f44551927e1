"""The step that makes a parameter of the model a DTensor.

It stays one in `named_parameters`, for the optimizer, checkpoints and FSDP2. The modules of the model read this rank's
plain part of it, whose gradient goes back as a DTensor, by `mmtrain.model.weights.local`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, or a plain tensor itself, with the same memory and outside of autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Make a parameter of a (meta) module a DTensor.

    Args:
        module: whose parameter it is, itself or a part of it.
        name: of the parameter in `module`, with dots.
        mesh: the ranks that it is split over, or that hold copies.
        placements: one for each axis of the mesh.
    """
    path, _, leaf = name.rpartition(".")
    owner, full = module.get_submodule(path), module.get_parameter(name)
    # No rank sends its values: parameters are placed before they have any.
    placed = distribute_tensor(full.detach(), mesh, placements, src_data_rank=None)
    owner.register_parameter(leaf, nn.Parameter(placed, requires_grad=full.requires_grad))

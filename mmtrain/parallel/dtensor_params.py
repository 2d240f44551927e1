"""How the modules of a model meet parameters that are DTensors: as this rank's plain part.

Our kernels and autograd functions know no DTensor. A module whose parameters were placed here keeps them as DTensors
in `named_parameters`, for the optimizer, checkpoints and FSDP2; what its `forward` reads as `self.weight` is the local
part, whose gradient goes back as a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def place(
    module: nn.Module,
    name: str,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    view: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Make a parameter of a (meta) module a DTensor of which its `forward` sees the local part.

    Where it is replicated, the ranks use it for different tokens or heads: their gradients are partial sums.

    Args:
        placements: one for each axis of the mesh.
        view: what `forward` sees of the local part; by default all of it.
    """
    full = module._parameters[name]
    assert full is not None
    # No rank sends its values: parameters are placed before they have any.
    placed = distribute_tensor(full.detach(), mesh, placements, src_data_rank=None)
    module._parameters[name] = nn.Parameter(placed, requires_grad=full.requires_grad)
    if not isinstance(module, _LocalParameters):
        module.__class__ = type(type(module).__name__, (_LocalParameters, type(module)), {})
        module._views = {}
    gradient = tuple(Partial() if isinstance(p, Replicate) else p for p in placements)
    module._views[name] = (gradient, view)


class _LocalParameters:
    """Mixed into the class of a module with placed parameters."""

    _views: dict[str, tuple[tuple[Placement, ...], Callable[[Tensor], Tensor] | None]]

    def __getattr__(self, name: str) -> object:
        value = super().__getattr__(name)
        if not isinstance(value, DTensor):
            return value
        gradient, view = self._views[name]
        if value.device_mesh.ndim != len(gradient):  # FSDP2 has not gathered it, and asks for it as it is
            return value
        local = value.to_local(grad_placements=gradient)
        return local if view is None else view(local)

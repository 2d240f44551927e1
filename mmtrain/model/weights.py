"""The call by which the model's modules read their parameters.

A parameter may be a DTensor, laid over processes by `mmtrain.parallel`; kernels and autograd functions know plain
tensors. A module's `forward` therefore reads every parameter through :func:`local`.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(weight: Tensor) -> Tensor:
    """Return the part of a parameter that this process computes with: a plain tensor itself, a DTensor's local shard.

    Where a DTensor is replicated, its ranks use it for different tokens or heads, so their gradients are partial sums.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if isinstance(p, Replicate) else p for p in weight.placements])

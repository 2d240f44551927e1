"""Weights of a rank that shares its parameters with no other: what FSDP2 does for mixed precision, without its hooks.

Masters stay fp32 DTensors in `named_parameters`, for optimizers and checkpoints. While a micro-batch runs, the modules
have copies of them in the type that blocks compute in, and gradients are summed in fp32. Copies and sums keep their
memory from step to step, so that a recorded graph of kernels finds them where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mmtrain.model.gradient_sum import whole_gradient
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.router import Router
from mmtrain.parallel.dtensor_params import shard_parameter
from mmtrain.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class _Weight:
    """A parameter and what stands in for it while a micro-batch runs.

    Attributes:
        owner: module that has it, under the name `leaf`.
        master: fp32, for the optimizer.
        used: what the module computes with: a copy in another type, or the master's own memory.
        total: fp32, sum of the gradients of the step's micro-batches.
        grad: the same memory as the master's gradient.
    """

    owner: nn.Module
    leaf: str
    master: nn.Parameter
    used: nn.Parameter
    total: Tensor
    grad: DTensor

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.leaf] = parameter


class ComputeWeights:
    """Copies of all parameters to compute with, and the sums of their gradients.

    Args:
        model: a (meta) model of plain parameters, which become DTensors of one rank.
        context: a world of one rank.
        compute_dtype: type of the copies; routers' weights are used in fp32, as they are.
    """

    def __init__(self, model: HybridLM, context: ParallelContext, compute_dtype: torch.dtype) -> None:
        self._model, self._dtype = model, compute_dtype
        self._weights: list[_Weight] = []
        for name, _ in list(model.named_parameters()):
            shard_parameter(model, name, context.replicas, [Shard(0)])

    @contextmanager
    def micro_batch(self, first: bool, last: bool) -> Iterator[None]:
        """Let the modules compute with the copies for forward and backward of one micro-batch.

        Args:
            first: it is the step's first: copies are brought up to date, and sums begin at zero.
            last: it is the step's last: the masters get the sums as their gradients.
        """
        with self._in_use(fresh=first):
            if first:
                torch._foreach_zero_([weight.total for weight in self._weights])
            yield
        if last:
            for weight in self._weights:
                whole_gradient(weight.used)  # in the memory that `grad` has
                weight.master.grad = weight.grad

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """Let the modules compute with fresh copies, without gradients."""
        with self._in_use(fresh=True):
            yield

    @contextmanager
    def _in_use(self, fresh: bool) -> Iterator[None]:
        if not self._weights:  # masters get their memory after the model was laid out
            self._weights = [self._weight(*where) for where in _owners(self._model)]
        if fresh:
            self._bring_up_to_date()
        for weight in self._weights:
            weight.put(weight.used)
        try:
            yield
        finally:
            for weight in self._weights:
                weight.put(weight.master)

    @torch.no_grad()
    def _bring_up_to_date(self) -> None:
        copies = [weight for weight in self._weights if weight.used.dtype != weight.master.dtype]
        if copies:
            torch._foreach_copy_([one.used for one in copies], [one.master.to_local() for one in copies])

    @torch.no_grad()
    def _weight(self, owner: nn.Module, leaf: str) -> _Weight:
        master = owner._parameters[leaf]
        assert isinstance(master, DTensor)
        local, dtype = master.to_local().detach(), master.dtype if isinstance(owner, Router) else self._dtype
        used = nn.Parameter(local if dtype == local.dtype else torch.empty_like(local, dtype=dtype))
        total = torch.zeros_like(local)
        if dtype == local.dtype:
            used.grad = total  # autograd adds to what is there
        else:
            used.register_post_accumulate_grad_hook(_add_to(total))
        used.gradient_sum = total  # for products that add to it themselves (`mmtrain.model.gradient_sum`)
        grad = DTensor.from_local(total, master.device_mesh, master.placements, run_check=False)
        return _Weight(owner, leaf, master, used, total, grad)


def _owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter's module, and its name there."""
    return [(module, leaf) for module in model.modules() for leaf, _ in module.named_parameters(recurse=False)]


def _add_to(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a product may have added to the sum itself
            total.add_(parameter.grad)
            parameter.grad = None

    return add

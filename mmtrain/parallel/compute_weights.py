"""Weights of ranks that have all parameters to compute with: what FSDP2 does for mixed precision, without its hooks.

Masters stay fp32 DTensors in `named_parameters`, for optimizers and checkpoints, sharded over the ranks. While a
micro-batch runs, the modules have whole copies of them in the type that blocks compute in, and gradients are summed in
fp32. Copies and sums keep their memory from step to step, so that a recorded graph of kernels finds them where they
were. Several ranks exchange them once a step (ZeRO-1), layer by layer: copies beside its first forward pass, and sums
beside its last backward pass. One rank shares with no other.
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
from mmtrain.parallel.dtensor_params import local_tensor, shard_parameter
from mmtrain.parallel.fsdp import free_dimension
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.units import UnitWatch
from mmtrain.parallel.weight_buckets import ShardedWeight
from mmtrain.parallel.weight_exchange import WeightExchange
from mmtrain.vision.contrastive import ContrastiveHead


@dataclass(frozen=True)
class _Weight:
    """A parameter and what stands in for it while a micro-batch runs.

    Attributes:
        owner: module that has it, under the name `leaf`.
        master: fp32, for the optimizer.
        used: what the module computes with, whole: a copy, or the master's own memory.
        total: fp32, sum of the gradients of the step's micro-batches on this rank; None of a frozen one.
        grad: the master's gradient; on one rank the memory of `total`; None of a frozen one.
        unit: whose forward pass needs it (`mmtrain.parallel.units`).
    """

    owner: nn.Module
    leaf: str
    unit: int
    master: nn.Parameter
    used: nn.Parameter
    total: Tensor | None
    grad: DTensor | None

    @property
    def sharded(self) -> ShardedWeight:
        """What several ranks exchange of it."""
        (placement,) = self.master.placements
        shard, grad = local_tensor(self.master), None if self.grad is None else local_tensor(self.grad)
        return ShardedWeight(self.used.detach(), self.total, shard, grad, placement.dim, self.unit)

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.leaf] = parameter


class ComputeWeights:
    """Copies of all parameters to compute with, and the sums of the gradients of those that are trained.

    Copies of frozen ones are made once, when they are first used: by then the masters have their values.

    Args:
        model: a (meta) model of plain parameters, which become DTensors over the replicas.
        context: ranks that are all replicas of each other.
        compute_dtype: type of the copies; weights of routers and of the contrastive head are used in fp32,
            as they are.

    Attributes:
        watch: hears which units' copies are needed and which units' sums are whole.
    """

    def __init__(self, model: HybridLM, context: ParallelContext, compute_dtype: torch.dtype) -> None:
        self._model, self._dtype = model, compute_dtype
        self._weights: list[_Weight] = []
        self._trained: list[_Weight] = []
        self._replicas = context.replicas
        self._exchange: WeightExchange | None = None
        self._unfinished = 0  # of the trained, whose sums are not gradients yet
        self.watch = UnitWatch(model, self._wait_for, self._share_sums)
        if self._replicas.size() > 1:
            self.watch.listen(model)
        for name, parameter in list(model.named_parameters()):
            placement = free_dimension(parameter, self._replicas.size()) or Shard(0)
            shard_parameter(model, name, self._replicas, [placement])

    @contextmanager
    def micro_batch(self, first: bool, last: bool) -> Iterator[None]:
        """Let the modules compute with the copies for forward and backward of one micro-batch.

        Args:
            first: it is the step's first: copies are brought up to date, and sums begin at zero.
            last: it is the step's last: the masters get the sums, or the mean of all ranks', as their gradients.
        """
        with self._in_use():
            if first:
                self._bring_up_to_date()
                torch._foreach_zero_([weight.total for weight in self._trained])
            self._unfinished = len(self._trained)
            self.watch.begin(tells_done=last and self._exchange is not None)
            yield
        self._wait_for(self.watch.head)
        if last:
            self._finish_sums(0)
            for weight in self._trained:
                weight.master.grad = weight.grad
            if self._exchange is not None:
                self._exchange.finish_reduce()

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """Let the modules compute with fresh copies, without gradients."""
        with self._in_use():
            self._bring_up_to_date()
            self._wait_for(self.watch.head)
            self.watch.begin(tells_done=False)
            yield

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self._weights:  # masters get their memory after the model was laid out
            self._make_weights()
        for weight in self._weights:
            weight.put(weight.used)
        try:
            yield
        finally:
            for weight in self._weights:
                weight.put(weight.master)

    def _make_weights(self) -> None:
        owners = sorted(_owners(self._model), key=lambda where: self.watch.unit_of(where[0]))
        self._weights = [self._weight(*where) for where in owners]
        self._trained = [weight for weight in self._weights if weight.total is not None]
        frozen = [weight for weight in self._weights if weight.total is None]
        if self._replicas.size() == 1:
            _copy(frozen)
            return
        group = self._replicas.get_group()
        if frozen:
            WeightExchange([one.sharded for one in frozen], group).gather()
        self._exchange = WeightExchange([one.sharded for one in self._trained], group)

    def _bring_up_to_date(self) -> None:
        """Begin to; what runs before the first layer finds its copies."""
        if self._exchange is not None:
            self._exchange.start_gather()
            self._wait_for(0)
        else:
            _copy(self._trained)

    def _wait_for(self, unit: int) -> None:
        if self._exchange is not None:
            self._exchange.wait_for(unit)

    def _share_sums(self, unit: int) -> None:
        """Begin to reduce the sums from a unit on, which no more gradient is added to."""
        self._finish_sums(unit)
        if self._exchange is not None:
            self._exchange.start_reduce(unit)

    def _finish_sums(self, unit: int) -> None:
        """Make gradients of the sums from a unit on, each once, in their memory."""
        while self._unfinished and self._trained[self._unfinished - 1].unit >= unit:
            self._unfinished -= 1
            whole_gradient(self._trained[self._unfinished].used)

    @torch.no_grad()
    def _weight(self, owner: nn.Module, leaf: str) -> _Weight:
        master = owner._parameters[leaf]
        assert isinstance(master, DTensor)
        exact = isinstance(owner, Router | ContrastiveHead)
        local, dtype = master.to_local().detach(), master.dtype if exact else self._dtype
        alone = self._replicas.size() == 1
        whole = local if alone and dtype == local.dtype else local.new_empty(master.shape, dtype=dtype)
        used = nn.Parameter(whole, requires_grad=master.requires_grad)
        unit = self.watch.unit_of(owner)
        if not master.requires_grad:
            return _Weight(owner, leaf, unit, master, used, None, None)
        total = local.new_zeros(master.shape)
        if dtype == local.dtype:
            used.grad = total  # autograd adds to what is there
        else:
            used.register_post_accumulate_grad_hook(_add_to(total))
        used.gradient_sum = total  # for products that add to it themselves (`mmtrain.model.gradient_sum`)
        grad = total if alone else torch.zeros_like(local)
        laid = {"shape": master.shape, "stride": master.stride()}  # parts may be uneven
        shared = DTensor.from_local(grad, master.device_mesh, master.placements, run_check=False, **laid)
        return _Weight(owner, leaf, unit, master, used, total, shared)


@torch.no_grad()
def _copy(weights: list[_Weight]) -> None:
    """Bring copies in another type up to date with masters that lie here whole."""
    copies = [weight for weight in weights if weight.used.dtype != weight.master.dtype]
    if copies:
        torch._foreach_copy_([one.used for one in copies], [local_tensor(one.master) for one in copies])


def _owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter's module, and its name there."""
    return [(module, leaf) for module in model.modules() for leaf, _ in module.named_parameters(recurse=False)]


def _add_to(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a product may have added to the sum itself
            total.add_(parameter.grad)
            parameter.grad = None

    return add

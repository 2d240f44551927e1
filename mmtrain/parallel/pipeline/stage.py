"""One stage of a pipeline, as torch's schedules see it.

Legend: T tokens of a micro-batch, S = T / tp tokens of it on a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.pipelining import PipelineStage

from mmtrain.config import ParallelConfig
from mmtrain.model.model import HybridLM, LossOutput, ModelInputs
from mmtrain.parallel.fsdp import set_micro_batch
from mmtrain.parallel.pipeline.micro_batch import MicroBatchResult, detached


class Stage(nn.Module):
    """A stage as torch's schedules call it: hidden states in, hidden states or the loss out."""

    def __init__(self, model: HybridLM, config: ParallelConfig) -> None:
        super().__init__()
        self.model, self.config, self.split_backward = model, config, config.pp_schedule == "zero_bubble"
        numbers = model.layer_numbers
        self.layers = range(numbers[0], numbers[-1] + 1)
        self.graphs: dict[int, Tensor] = {}

    def begin(
        self, batches: list[ModelInputs], token_scale: Tensor, aux_scale: float, results: list[MicroBatchResult]
    ) -> None:
        """Take what the micro-batches of a step need; results are appended to `results` as they come."""
        self.batches, self.token_scale, self.aux_scale, self.results = batches, token_scale, aux_scale, results
        self.graphs.clear()
        if self.split_backward:  # what FSDP does after a backward comes before there are gradients of weights
            self.model.set_requires_gradient_sync(False)
            self.model.set_reshard_after_backward(False)

    def forward(self, *hidden: Tensor, micro_batch: Tensor) -> Tensor:
        """Run a micro-batch: `hidden` is empty in the first stage, [S, D] in others; `micro_batch` int64 [1], on CPU.

        Returns hidden states [S, D], or from the last stage the scaled loss. Their gradient brings the auxiliary
        losses' with it.
        """
        number = int(micro_batch)
        batch = self.batches[number]
        out = self.model(*(batch._replace(tokens_T=hidden[0]) if hidden else batch))
        passed_on = out.ce_sum * self.token_scale if isinstance(out, LossOutput) else out.h_TD
        self.results.append(MicroBatchResult(batch.packing, self.layers, detached(out)))
        if self.split_backward and torch.is_grad_enabled():
            self.graphs[number] = passed_on
        return _PassOn.apply(passed_on, out.aux_loss, self.aux_scale, lambda: self._before_backward(number))

    def _before_backward(self, number: int) -> None:
        """Reduce gradients in the backward that is about to run, or not. Each stage runs them in order."""
        if not self.split_backward:
            set_micro_batch(self.model, self.config, last=number == len(self.batches) - 1)


class TorchStage(PipelineStage):
    """Torch's stage, with the care that a stage needs whose weight gradients are computed apart from its input's."""

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Called by the schedule; lets go of the micro-batch's graph.

        Torch holds the nodes that it begins with by their Python side alone, which need not own those of our autograd
        functions (`ownership_token` of torch.autograd.graph.GradientEdge says why). The nodes nearest to the output
        keep the rest of the graph anyway, so holding it costs nothing.
        """
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        del self.submod.graphs[bwd_chunk_id]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Called by the schedule after the stage's last backward.

        FSDP's own hooks run with the gradient of the input, before there are gradients of weights. Torch reduces them
        for a stage that is an FSDP module; ours has one inside.
        """
        outer = self.submod
        if outer.split_backward:
            self.submod = outer.model
            super().perform_reduce_grad(grad_scale_factor)
            self.submod = outer


class _PassOn(torch.autograd.Function):
    """Identity on the output of a stage, whose backward, the first of the stage's, starts the auxiliary loss's too."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, passed_on: Tensor, aux_loss: Tensor, aux_scale: float, before: Callable[[], None]
    ) -> Tensor:
        ctx.aux_scale, ctx.dtype, ctx.before = aux_scale, aux_loss.dtype, before
        return passed_on.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.before()
        return grad, grad.new_full((), ctx.aux_scale, dtype=ctx.dtype), None, None

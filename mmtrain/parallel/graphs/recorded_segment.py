"""A segment of the model as two CUDA graphs, one of its forward and one of its backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.parallel.graphs.segments import Segment, SegmentInputs, SegmentOutput

RESIDUAL = 3
"""Place of the residual among what a segment passes on, behind q, k and v."""


class Recorder:
    """The stream and the memory pool of graphs that are recorded in the order in which they will be replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._scratch: dict[tuple[int, torch.Size], Tensor] = {}

    def scratch(self, place: int, like: Tensor) -> Tensor:
        """Memory that all segments use in turn, each before its backward pass, for a place of their output."""
        key = place, like.shape
        if key not in self._scratch:
            self._scratch[key] = torch.zeros_like(like)
        return self._scratch[key]

    @contextmanager
    def record(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Let kernels that are launched inside go to a new graph; they do not run."""
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            # Other threads read rows and write checkpoints meanwhile: what they ask of CUDA does not concern the graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield graph
            except BaseException:
                with suppress(RuntimeError):  # the graph is of no use, but the stream is to be free again
                    graph.capture_end()
                raise
            graph.capture_end()
        caller.wait_stream(self._stream)


class RecordedSegment:
    """A segment that is replayed on the memory that it was recorded on.

    Gradients of weights are added where hooks of the weights put them, as part of the recorded backward. What wants a
    gradient is what wants one without graphs: kernels are chosen by it.

    Args:
        segment: to be recorded.
        carried: memory of what it is given; the residual of a softmax layer is the memory that the segment before
            leaves it in.
        wants: which of `carried` want a gradient; none do where all below is frozen.
        inputs: memory of what all segments read.
        recorder: of all segments.

    Attributes:
        wants: which of what it leaves (`SegmentOutput.differentiable`) want a gradient.
        reached: whether the backward pass comes here.
    """

    def __init__(
        self,
        segment: Segment,
        carried: Sequence[Tensor],
        wants: Sequence[bool],
        inputs: SegmentInputs,
        recorder: Recorder,
    ) -> None:
        self._recorder = recorder
        self.carried = tuple(carried)
        self._leaves = tuple(tensor.detach().requires_grad_(want) for tensor, want in zip(carried, wants, strict=True))
        with recorder.record() as self._forward, torch.enable_grad():
            self._out: SegmentOutput | None = segment(self._leaves, inputs)
        self.left = self._out.detached()
        self.wants = tuple(tensor.requires_grad for tensor in self._out.differentiable)
        self.reached = any(self.wants)
        if not self.reached:
            self._out = None
        self.grads_out: tuple[Tensor | None, ...] = ()
        self.grads_in: tuple[Tensor | None, ...] = ()

    def record_backward(self, residual_grad: Tensor | None) -> None:
        """Record the backward pass; segments are recorded from the last to the first.

        Args:
            residual_grad: memory in which the next segment's backward leaves the residual's gradient; None for the
                last segment, and where there is no such gradient.
        """
        assert self._out is not None
        self.grads_out = tuple(
            self._memory_of(place, tensor, residual_grad) if self.wants[place] else None
            for place, tensor in enumerate(self.left.differentiable)
        )
        out = [tensor for tensor, want in zip(self._out.differentiable, self.wants, strict=True) if want]
        with self._recorder.record() as self._backward:
            torch.autograd.backward(out, [grad for grad in self.grads_out if grad is not None])
        self.grads_in = tuple(leaf.grad for leaf in self._leaves)
        self._out = None  # its graph has gone, and holds no memory any more

    def _memory_of(self, place: int, left: Tensor, residual_grad: Tensor | None) -> Tensor:
        """Memory that the gradient of what was left in a place is read from."""
        if place == RESIDUAL and residual_grad is not None:
            return residual_grad
        return self._recorder.scratch(place, left)

    def __call__(self, carried: Sequence[Tensor], inputs: SegmentInputs) -> SegmentOutput:
        """Replay the segment; `inputs` are in the memory that it was recorded on already."""
        if self.reached and torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in carried):
            # The lowest that is reached: autograd calls backward for what wants a gradient, and knows of no weights.
            carried = (carried[0].detach().requires_grad_(), *carried[1:])
        return self.left.with_differentiable(_Replay.apply(self, *carried))

    def replay_forward(self, carried: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward pass on `carried`, and return the memory that holds what it left."""
        _fill(self.carried, carried)
        self._forward.replay()
        return self.left.differentiable

    def replay_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run the backward pass on gradients of what was left, and return the memory of those of what was carried."""
        _fill(self.grads_out, grads)
        self._backward.replay()
        return self.grads_in


def _fill(memory: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Copy values to their memory, but for those that lie there already or have none; no gradient is one of zeros."""
    for place, value in zip(memory, values, strict=True):
        if place is None:
            continue
        if value is None:
            place.zero_()
        elif value.data_ptr() != place.data_ptr() or value.stride() != place.stride():
            place.copy_(value)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, recorded: RecordedSegment, *carried: Tensor) -> tuple[Tensor, ...]:
        ctx.recorded = recorded
        ctx.set_materialize_grads(False)
        left = tuple(tensor.detach() for tensor in recorded.replay_forward(carried))
        ctx.mark_non_differentiable(*(tensor for tensor, want in zip(left, recorded.wants, strict=True) if not want))
        return left

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.recorded.replay_backward(grads)
        return None, *(None if tensor is None else tensor.detach() for tensor in found)

"""Softmax attention that a block keeps when all else of it is computed again in backward.

What a layer can hold, by the operations that computing it again costs (bf16; D 4,096, F 11,264, heads of 128 wide):

| result | operations a byte | `selective` |
|---|---|---|
| norms, SiLU, gates, SwiGLU | 1 to 5 | again |
| lightning's output | 2 x 128 = 256, and its states | again |
| router's plan | D = 4,096, and few bytes: E numbers a token | again: it must not differ from its logits |
| projections, first products of the feed-forward | D = 4,096 | again |
| softmax attention's output and log-sum-exp | n, of a document of n tokens: 131,072 at 128K | kept |

Only the last grows: from documents of D tokens on it is the dearest a byte, and it is one width in one layer of eight.

Legend: T tokens, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from mmtrain.model.mixers.attention import AttentionCall
from mmtrain.model.packed_seq import Packing


class KeptResult:
    """Output of attention and what its backward needs, without q, k and v: for one block and one micro-batch.

    Attributes:
        o_THK: the output with its graph; None before attention has run.
    """

    def __init__(self) -> None:
        self.o_THK: Tensor | None = None
        self._edges: list[GradientEdge] = []
        self._inputs: tuple[Tensor, ...] = ()

    def run(self, attention: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        """Run attention on q, k and v, and keep nothing of their memory."""
        # Numbers alone: the graph holds `pack`, and would hold tensors with it.
        storages = [tensor.untyped_storage()._cdata for tensor in inputs]
        offsets = [tensor.storage_offset() for tensor in inputs]

        def pack(saved: Tensor) -> Any:
            storage = saved.untyped_storage()._cdata
            if storage not in storages:
                return saved.detach()
            place = storages.index(storage)
            return place, saved.shape, saved.stride(), saved.storage_offset() - offsets[place]

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            place, shape, stride, offset = packed
            given = self._inputs[place]
            return given.as_strided(shape, stride, given.storage_offset() + offset)

        with torch.enable_grad():
            began = _Entrance.apply(inputs[0].new_zeros((), requires_grad=True), *inputs)
            self._edges = [get_gradient_edge(tensor) for tensor in began]
            with saved_tensors_hooks(pack, unpack):
                self.o_THK = attention(*began)

    def gradients(self, do_THK: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of q, k and v, given them as they were computed again; what was kept is let go."""
        assert self.o_THK is not None
        self._inputs = inputs
        grads = torch.autograd.grad(self.o_THK, self._edges, do_THK)
        self.o_THK, self._edges, self._inputs = None, [], ()
        return grads


class KeptAttention:
    """An attention call whose softmax attention runs once, though the block around it runs again in backward.

    Attributes:
        inner: the call that computes.
        result: of the block's micro-batch at work; None runs `inner` as it is.
    """

    def __init__(self, inner: AttentionCall) -> None:
        self.inner, self.result = inner, None

    result: KeptResult | None

    def begin_lightning(self, qkv_THX: Tensor, slopes_H: Tensor, packing: Packing) -> Callable[[], Tensor]:
        """Begin lightning attention, which is computed again."""
        return self.inner.begin_lightning(qkv_THX, slopes_H, packing)

    def softmax(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packing: Packing) -> Tensor:
        """Return the output [T, H, K]: computed, or the one that was kept."""
        if self.result is None:
            return self.inner.softmax(q_THK, k_TGK, v_TGK, packing)
        if self.result.o_THK is None:
            inputs = tuple(tensor.detach() for tensor in (q_THK, k_TGK, v_TGK))
            self.result.run(lambda q, k, v: self.inner.softmax(q, k, v, packing), inputs)
        return _Kept.apply(q_THK, k_TGK, v_TGK, self.result)


class _Entrance(torch.autograd.Function):
    """q, k and v as results of something: their edges in the graph then hold no memory, as leaves would."""

    @staticmethod
    def forward(ctx: FunctionCtx, seed: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in inputs)  # no views, whose graph would hold their memory

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, ...]:
        return (None, *(None for _ in grads))


class _Kept(torch.autograd.Function):
    """The kept output in the graph of the block, whose saved q, k and v are those that are computed again."""

    @staticmethod
    def forward(ctx: FunctionCtx, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, result: KeptResult) -> Tensor:
        ctx.save_for_backward(q_THK, k_TGK, v_TGK)
        ctx.result = result
        return result.o_THK.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_THK: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(tensor.detach() for tensor in ctx.saved_tensors)
        return *ctx.result.gradients(do_THK, inputs), None

"""The feed-forward over chunks of tokens: its input alone waits for backward, which computes a chunk at a time again.

What a layer of T tokens holds, in elements: 3 T F of the first product and the activation until backward, and 3 T F
more there; in chunks of C tokens, nothing until backward (its input is the norm's output, which is there anyway), and
6 C F there. The first product is computed twice: 2 of the 9 products of a token with a weight matrix more. Under
recomputation of the block it costs nothing: that would compute this product again, and now stops before it, as
everything that is saved is there.

Legend: T tokens, C tokens of a chunk, D model width, F inner width; N and M outputs and inputs of one matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.swiglu import swiglu, swiglu_grad
from mmtrain.model.gradient_sum import accumulate


def chunk_slices(rows: int, chunk: int) -> list[slice]:
    """Ranges of at most `chunk` rows that make up `rows`; one that is empty if there are none."""
    return [slice(first, min(first + chunk, rows)) for first in range(0, max(rows, 1), chunk)]


class ChunkedFeedForward:
    """A call of the feed-forward that works on some tokens at a time, forward and backward.

    A row of a product does not depend on the others, so outputs and gradients of tokens are those of all tokens at
    once, up to the order in which a matrix library sums for other sizes. Gradients of the weights are summed over
    chunks in fp32 (float64 for float64) and rounded once.

    Attributes:
        tokens: C.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
        """Return W2 (SiLU(W1 x) * W3 x) of every token; [T, D] to [T, D]."""
        kept_TD = _Save.apply(x_TD, w13_2FD, w2_DF, self.tokens)
        return _Compute.apply(kept_TD, w13_2FD.detach(), w2_DF.detach(), self.tokens)


class _Save(torch.autograd.Function):
    """The first half of the call: saves the input and does all of backward.

    It is a function of its own so that saving comes before computing: a block that is run again in backward stops
    when the last saved tensor is there (torch's non-reentrant checkpoint).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(x_TD, w13_2FD, w2_DF)
        ctx.tokens = tokens
        return x_TD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_TD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return gradients of x and the weights; `dout` is the gradient of the second half's output."""
        x_TD, w13_2FD, w2_DF = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, _ = ctx.needs_input_grad
        parts = chunk_slices(x_TD.shape[0], ctx.tokens)
        dx_TD = torch.empty_like(x_TD) if needs_x else None
        dw13, dw2 = (WeightGradient(w, len(parts)) if n else None for w, n in ((w13_2FD, needs_w13), (w2_DF, needs_w2)))
        for part in parts:
            dx_CD = None if dx_TD is None else dx_TD[part]
            _chunk_backward(x_TD[part], dout_TD[part], w13_2FD.flatten(0, 1), w2_DF, dx_CD, dw13, dw2)
        return dx_TD, dw13 and dw13.result(), dw2 and dw2.result(), None


class _Compute(torch.autograd.Function):
    """The second half of the call: computes the output, and in backward hands its gradient to the first."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor, tokens: int) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        for part in chunk_slices(x_TD.shape[0], tokens):
            y_CF = swiglu(F.linear(x_TD[part], w13_2FD.flatten(0, 1)))
            torch.mm(y_CF, w2_DF.t(), out=out_TD[part])
            del y_CF  # before the next chunk's first product takes memory
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_TD: Tensor) -> tuple[Tensor, None, None, None]:
        return dout_TD, None, None, None


def _chunk_backward(
    x_CD: Tensor,
    dout_CD: Tensor,
    w13_ND: Tensor,
    w2_DF: Tensor,
    dx_CD: Tensor | None,
    dw13: WeightGradient | None,
    dw2: WeightGradient | None,
) -> None:
    """Write a chunk's gradient of x, and add those of the weights; `w13_ND` is both matrices, N = 2F."""
    dgate_up_CN, y_CF = swiglu_grad(F.linear(x_CD, w13_ND), dout_CD @ w2_DF)
    if dw2 is not None:
        dw2.add(dout_CD, y_CF)
    if dw13 is not None:
        dw13.add(dgate_up_CN, x_CD)
    if dx_CD is not None:
        torch.mm(dgate_up_CN, w13_ND, out=dx_CD)


class WeightGradient:
    """The gradient of one weight, summed over chunks in fp32 or wider and rounded once to the weight's dtype.

    Args:
        weight: of any shape [..., M] with N rows in all.
        chunks: calls of `add` to come; the product of a single one needs no sum, and is the one that autograd makes.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self._weight, self._alone = weight, chunks == 1
        self._total_NM: Tensor | None = None

    def add(self, dout_CN: Tensor, in_CM: Tensor) -> None:
        """Add a chunk's dout^T in."""
        if self._alone:
            self._total_NM = dout_CN.t() @ in_CM
            return
        if self._total_NM is None:
            wide = torch.promote_types(self._weight.dtype, torch.float32)
            self._total_NM = dout_CN.new_zeros(dout_CN.shape[1], in_CM.shape[1], dtype=wide)
        if not dout_CN.is_cuda:  # torch has no product there that adds into a wider sum
            dout_CN, in_CM = dout_CN.to(self._total_NM.dtype), in_CM.to(self._total_NM.dtype)
        accumulate(self._total_NM, dout_CN, in_CM)

    def result(self) -> Tensor:
        """Return the sum in the weight's shape and dtype."""
        assert self._total_NM is not None
        return self._total_NM.view(self._weight.shape).to(self._weight.dtype)

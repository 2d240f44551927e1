"""The experts' products over chunks of rows: their input alone waits for backward, which computes a chunk again.

Rows are sorted by expert, and where an expert's begin is known on the device alone. A chunk is therefore a fixed range
of rows, with the experts' ends cut to that range: most experts have no row in it, and one may have rows in several
chunks. The host never waits. Of R rows 2 R F elements less are held until backward, and 6 C F are made there in place
of 6 R F; the first product is computed twice.

Each chunk adds to the gradient of all E experts' weights, so chunks should be of thousands of rows an expert: the sum
moves 10 bytes a weight and chunk, beside 2 C / E operations.

Legend: R rows sorted by expert, C rows of a chunk, E experts, D model width, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from mmkernels.grouped_mlp import grouped_gate_up, grouped_mlp_forward, grouped_mlp_input_grad, grouped_weight_grad
from mmtrain.model.ffn_chunks import chunk_slices


def experts_in_chunks(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor, chunk: int) -> Tensor:
    """Each expert's SwiGLU MLP of its own rows, as `grouped_mlp` gives it, [R, D].

    Args:
        x_RD: rows sorted by expert; those from `offset_E[-1]` on belong to no expert and may hold anything.
        w13_E2FD: gate and up weights.
        w2_EDF: down weights.
        offset_E: int32, the row after each expert's last.
        chunk: C.
    """
    return _ExpertsInChunks.apply(x_RD, w13_E2FD, w2_EDF, offset_E, chunk)


def forward_in_chunks(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor, chunk: int) -> Tensor:
    """The result of :func:`experts_in_chunks` without autograd; rows that belong to no expert are unwritten."""
    parts = chunk_slices(x_RD.shape[0], chunk)
    if len(parts) == 1:
        return grouped_mlp_forward(x_RD, w13_E2FD, w2_EDF, offset_E)[0]
    y_RD = torch.empty_like(x_RD)
    for part in parts:
        y_RD[part] = grouped_mlp_forward(x_RD[part], w13_E2FD, w2_EDF, _ends_within(offset_E, part))[0]
    return y_RD


def backward_in_chunks(
    dy_RD: Tensor, x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor, chunk: int, weights: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the rows and of both weights of :func:`experts_in_chunks`.

    Those of the weights are summed over chunks in fp32 (float64 for float64): a chunk's product is rounded to the
    rows' dtype first, so an expert with rows in n chunks has n roundings of parts in place of one of the whole.

    Args:
        dy_RD: gradient of the result.
        weights: whether those of the weights are wanted; None is returned for them otherwise.
    """
    parts = chunk_slices(x_RD.shape[0], chunk)
    dx_RD = torch.empty_like(x_RD) if len(parts) > 1 else None
    dw13, dw2 = _Sum(w13_E2FD, len(parts)), _Sum(w2_EDF, len(parts))
    for part in parts:
        dx_CD = _chunk_backward(
            dy_RD[part], x_RD[part], w13_E2FD, w2_EDF, _ends_within(offset_E, part), (dw13, dw2) if weights else None
        )
        if dx_RD is None:
            dx_RD = dx_CD
        else:
            dx_RD[part] = dx_CD
    return dx_RD, dw13.result() if weights else None, dw2.result() if weights else None


class _ExpertsInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(x_RD, w13_E2FD, w2_EDF, offset_E)
        ctx.chunk = chunk
        return forward_in_chunks(x_RD, w13_E2FD, w2_EDF, offset_E, chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_RD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return *backward_in_chunks(dy_RD, *ctx.saved_tensors, ctx.chunk, weights), None, None


def _ends_within(offset_E: Tensor, part: slice) -> Tensor:
    """The row of a range of rows after each expert's last within it."""
    return (offset_E - part.start).clamp_(0, part.stop - part.start)


def _chunk_backward(
    dy_CD: Tensor, x_CD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, offset_E: Tensor, sums: tuple[_Sum, _Sum] | None
) -> Tensor:
    """Return a chunk's gradient of its rows, and add those of w13 and w2 to their sums."""
    gate_up_C2F = grouped_gate_up(x_CD, w13_E2FD, offset_E)
    dx_CD, dgate_up_C2F, hidden_CF = grouped_mlp_input_grad(dy_CD, gate_up_C2F, w13_E2FD, w2_EDF, offset_E)
    if sums is not None:
        dw13, dw2 = sums
        dw2.add(grouped_weight_grad(dy_CD, hidden_CF, offset_E))
        dw13.add(grouped_weight_grad(dgate_up_C2F, x_CD, offset_E))
    return dx_CD


class _Sum:
    """The sum of a weight's gradients over chunks, in fp32 or wider; that of a single chunk as it is."""

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self._weight, self._alone = weight, chunks == 1
        self._total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self._total is None:
            wide = part.dtype if self._alone else torch.promote_types(part.dtype, torch.float32)
            self._total = part.to(wide)
        else:
            self._total += part

    def result(self) -> Tensor:
        assert self._total is not None
        return self._total.view(self._weight.shape).to(self._weight.dtype)

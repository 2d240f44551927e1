"""The public function of the embedding's gradient: checks and dispatch.

Legend: T tokens, V rows of the table (vocabulary), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.embedding import eager
from mmkernels.embedding.checks import check_arguments


@torch.no_grad()
def add_embedding_grad(total_VD: Tensor, tokens_T: Tensor, dy_TD: Tensor, *, backend: str = "auto") -> Tensor:
    """The sum of a table's gradients, in place: ``total[tokens[t]] += dy[t]`` for every t.

    Rows of one token are added in a fixed order, so two runs give the same bits; rows that no token names are neither
    read nor written. Nothing of size V D is made, and the host does not wait for a GPU.

    Args:
        total_VD: the sum [V, D], float32 (or float64, through torch), contiguous; it is changed.
        tokens_T: int64 [T], in any order; a token outside of [0, V) adds nothing.
        dy_TD: gradient of the rows that were looked up, [T, D] with any strides: float32, bfloat16 or float16
            (or float64, to a float64 sum).
        backend: "triton", "torch", or "auto": Triton on CUDA, except for a float64 sum, else torch.

    Returns:
        `total_VD` itself.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_arguments(total_VD, tokens_T, dy_TD)
    add = eager.add
    if use_triton(backend, "total_VD", total_VD):
        from mmkernels.embedding.launch import add  # only this path needs Triton
    if total_VD.numel() and dy_TD.numel():
        add(total_VD, tokens_T, dy_TD)
    return total_VD

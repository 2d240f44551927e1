"""Our kernels for Hopper: documents of any lengths, or one block, in one launch forward and two backward.

Legend: T queries, S keys, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmkernels.softmax.hopper.tiles import Documents


@functools.cache
def is_available() -> bool:
    """Whether this Triton has the language that they are written in, and compiles it: the interpreter does not."""
    try:
        from mmkernels.common.triton_support import INTERPRETED
        from mmkernels.softmax.hopper import launch
    except ImportError:
        return False
    return bool(launch) and not INTERPRETED


def forward_documents(
    q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of q, and log-sum-exp [H, T], float32."""
    from mmkernels.softmax.hopper import launch  # Triton does not exist wherever torch does

    with torch.cuda.device_of(q_THD):
        return launch.forward(q_THD, k_SGD, v_SGD, documents, scale)


def backward_documents(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; the probabilities are ``exp(score - lse)`` with the lse given."""
    from mmkernels.softmax.hopper import launch

    with torch.cuda.device_of(q_THD):
        return launch.backward(do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT, documents, scale)


def forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One block, as :func:`forward_documents`."""
    return forward_documents(q_THD, k_SGD, v_SGD, _block(q_THD, k_SGD, causal), scale)


def backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One block, as :func:`backward_documents`."""
    return backward_documents(do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT, _block(q_THD, k_SGD, causal), scale)


def full_forward(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One block in which every query sees every key, as :func:`forward_documents`."""
    return forward(q_THD, k_SGD, v_SGD, False, scale)


def full_backward(
    do_THD: Tensor, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, o_THD: Tensor, lse_HT: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block in which every query sees every key."""
    return backward(do_THD, q_THD, k_SGD, v_SGD, o_THD, lse_HT, False, scale)


def _block(q_THD: Tensor, k_SGD: Tensor, causal: bool) -> Documents:
    return Documents((q_THD.shape[0],), (k_SGD.shape[0],), causal, q_THD.device)

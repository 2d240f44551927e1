"""The public functions of the router: checks and dispatch.

Legend: T tokens, N tokens whose statistics are taken together, D model width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.router.checks import check_balance_arguments, check_logits_arguments
from mmkernels.router.naive import naive_balance_stats, naive_router_logits

OTHERS = ("naive",)


def router_logits(x_TD: Tensor, weight_ED: Tensor, *, backend: str = "auto") -> Tensor:
    """Logits of every expert for every token, ``x @ weight^T`` as precise as an fp32 product.

    The kernel reads x as it is and saves it and the weight alone; nothing of size T D is written, forward or backward,
    but the gradient of x.

    Args:
        x_TD: tokens [T, D], bfloat16, float16 or float32 (float64 too without the kernel, where it becomes float32).
        weight_ED: float32, [E, D] with 1 to 1024 experts.
        backend: "auto" (the kernel on CUDA, else "naive"), "triton" or "naive" (torch).

    Returns:
        Float32 [T, E]. Gradients flow to x, in its dtype, and to the weight; no second derivatives in the kernel.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_logits_arguments(x_TD, weight_ED)
    if use_triton(backend, "x_TD", x_TD, others=OTHERS):
        from mmkernels.router.launch import triton_router_logits

        return triton_router_logits(x_TD, weight_ED)
    return naive_router_logits(x_TD, weight_ED)


def balance_stats(logits_NE: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean over tokens and entropy of the softmax over experts, for the auxiliary loss and a report.

    Args:
        logits_NE: float32 [N, E] (float64 too without the kernel), 1 to 1024 experts.
        backend: "auto" (the kernel on CUDA, else "naive"), "triton" or "naive" (torch).

    Returns:
        Mean probability of each expert, [E], with a gradient to the logits (no second derivatives in the kernel); and
        the mean entropy in nats, a detached scalar. Both in the dtype of the logits, and zero without tokens.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_balance_arguments(logits_NE)
    if use_triton(backend, "logits_NE", logits_NE, others=OTHERS):
        from mmkernels.router.launch import triton_balance_stats

        return triton_balance_stats(logits_NE)
    return naive_balance_stats(logits_NE)

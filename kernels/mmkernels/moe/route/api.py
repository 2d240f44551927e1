"""The public function of routing: checks and dispatch.

Legend: T tokens, E experts, K experts a token, R rows.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.common.checks import use_triton
from mmkernels.moe.route.checks import check_route
from mmkernels.moe.route.naive import naive_route
from mmkernels.moe.route_types import Quotas, Route


def route(
    logits_TE: Tensor,
    top_k: int,
    capacity: int | None = None,
    drop_policy: str = "probs",
    *,
    quotas: Quotas | None = None,
    backend: str = "auto",
) -> Route:
    """Choose each token's experts, weigh them, drop what is over capacity, number the rest by expert.

    A dropped assignment's weight stays; the token's other weights are not renormalised. The host never waits for the
    device. A NaN logit counts as the greatest and makes its token's weights NaN.

    Args:
        logits_TE: router logits, float32 [T, E], E up to 1024.
        top_k: experts a token, 1 to E.
        capacity: assignments an expert takes, at least 1; None drops nothing.
        drop_policy: over capacity, "probs" drops the assignments with the lowest weights first (with top_k 1, where
            every weight is 1, the lowest probabilities among all experts), of equal ones the latest tokens;
            "position" drops the latest tokens.
        quotas: instead of a capacity, a function from the number of assignments of each expert, before any is
            dropped, to the number that each may keep, so that ranks can share capacity out among them.
        backend: "auto" (the kernels on CUDA, else torch), "triton" or "naive".

    Returns:
        A :class:`Route` with ``R = min(T * top_k, E * capacity)`` rows (``T * top_k`` without a capacity). Gradient
        flows from ``weight_TK`` to the logits.

    Raises:
        KernelArgumentError: an argument does not fit; the message names it and what is allowed.
    """
    check_route(logits_TE, top_k, capacity, drop_policy, quotas)
    if not use_triton(backend, "logits_TE", logits_TE, others=("naive",)):
        return naive_route(logits_TE, top_k, capacity, drop_policy, quotas)
    from mmkernels.moe.route.launch import triton_route

    return triton_route(logits_TE, top_k, capacity, drop_policy, quotas)

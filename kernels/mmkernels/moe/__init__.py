"""Routing of tokens to experts, and the way of their rows there and back. See README.md beside this file."""

from mmkernels.moe.permute.api import permute, permute_grad, take_rows, unpermute, unpermute_grads
from mmkernels.moe.route.api import route
from mmkernels.moe.route_types import DROP_POLICIES, Quotas, ReceivedRows, Route, static_rows
from mmkernels.moe.slots.api import sort_received, to_slots

__all__ = [
    "DROP_POLICIES",
    "Quotas",
    "ReceivedRows",
    "Route",
    "permute",
    "permute_grad",
    "route",
    "sort_received",
    "static_rows",
    "take_rows",
    "to_slots",
    "unpermute",
    "unpermute_grads",
]

"""Routing of tokens to experts, and the way of their rows there and back. See README.md beside this file."""

from mmkernels.moe.layout import Quotas, Route
from mmkernels.moe.permute import permute, permute_grad, take_rows, unpermute, unpermute_grads
from mmkernels.moe.places import Arrivals, sort_arrivals, to_places
from mmkernels.moe.route import route

__all__ = [
    "Arrivals",
    "Quotas",
    "Route",
    "permute",
    "permute_grad",
    "route",
    "sort_arrivals",
    "take_rows",
    "to_places",
    "unpermute",
    "unpermute_grads",
]

"""Routing of tokens to experts, and the way of their rows there and back. See README.md beside this file."""

from mmkernels.moe.layout import NewRows, Quotas, Route
from mmkernels.moe.permute import permute, take_rows, unpermute
from mmkernels.moe.places import Arrivals, sort_arrivals, to_places
from mmkernels.moe.route import route

__all__ = [
    "Arrivals",
    "NewRows",
    "Quotas",
    "Route",
    "permute",
    "route",
    "sort_arrivals",
    "take_rows",
    "to_places",
    "unpermute",
]

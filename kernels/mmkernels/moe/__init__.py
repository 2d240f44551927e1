"""Routing of tokens to experts, and the way of their rows there and back. See README.md beside this file."""

from mmkernels.moe.layout import Quotas, Route
from mmkernels.moe.permute import permute, unpermute
from mmkernels.moe.route import route

__all__ = ["Quotas", "Route", "permute", "route", "unpermute"]

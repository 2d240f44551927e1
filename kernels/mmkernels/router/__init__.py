"""The router's logits, and what its auxiliary loss and statistics need of them. See README.md beside this file."""

from mmkernels.router.api import balance_stats, router_logits

__all__ = ["balance_stats", "router_logits"]

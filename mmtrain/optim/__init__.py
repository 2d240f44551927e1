"""Optimizers over sharded fp32 master weights."""

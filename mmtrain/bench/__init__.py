"""Benchmarks of the whole model; figures go to `results/`."""

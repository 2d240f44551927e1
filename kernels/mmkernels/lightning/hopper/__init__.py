"""Kernels for Hopper GPUs, in Gluon."""

"""Pieces of device code (jit functions) that the kernels of Triton and of Gluon share."""

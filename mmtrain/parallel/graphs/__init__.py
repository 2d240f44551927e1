"""CUDA graphs of a model's forward and backward: the host launches a few graphs in place of thousands of kernels."""

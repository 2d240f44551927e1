"""Packed softmax attention for Hopper GPUs, in Gluon."""

"""Tensor parallelism with sequence parallelism: heads, widths and the vocabulary split over ranks."""

"""Backend ``triton``: the fast path on GPUs, its launches, and the choice of kernel."""

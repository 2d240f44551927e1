"""Settings that must hold before anything is imported."""

from __future__ import annotations

import os

import torch

# Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

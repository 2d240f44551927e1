"""Settings that must hold before anything is imported."""

from __future__ import annotations

import os
from typing import Any

# Workers of pytest-xdist share the cores, and OpenMP reads this when torch is imported. Teams of threads that spin for
# one another made tests of tiny tensors many times as long: on 2 cores, the gradcheck of the loss 13 s in place of 1,
# and beside another busy process one test of the engine 198 s in place of 6.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def _mend_interpreter() -> None:
    """Let Triton 3.6's interpreter take numpy 2.4, which makes no number of an array of one element."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


# Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU's tests where there is none: their shapes would fill a laptop's memory."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

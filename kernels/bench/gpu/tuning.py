"""Autotuned kernels of others compile all their configurations at once, on all cores.

flash-linear-attention's kernels have up to 48 configurations each, which Triton would compile one after another: the
bench would spend minutes on it. What is measured does not change.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def compile_configurations_together() -> None:
    """Make Triton's autotuner compile every configuration in threads before it times the first."""
    import triton
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.prune_configs

    def pruned(self: Any, kwargs: dict[str, Any], *rest: Any) -> list[Any]:
        configs = plain(self, kwargs, *rest)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                for config in configs:
                    self.fn.run(*self.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})
        except Exception as error:  # the autotuner then compiles them itself, one by one
            print(f"compiling together: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return configs

    Autotuner.prune_configs = pruned

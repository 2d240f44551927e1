#!/usr/bin/env python
"""Our chunked linear cross-entropy beside torch's own, forward and backward, fp32, on a CPU.

torch's chunked form (`LinearCrossEntropyOptions`) exists from 2.13 on; mmtrain runs on 2.11 too. One JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mmtrain.model.loss import linear_cross_entropy
from mmtrain.train.device import keep_freed_memory

TOKENS, WIDTH, VOCABULARY, CHUNK, REPEATS = 4096, 256, 32_768, 1024, 7


def candidates() -> tuple[list[torch.Tensor], dict[str, Callable[[], torch.Tensor]]]:
    """The leaves, and each loss of them by name."""
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    found = {"mmtrain": lambda: linear_cross_entropy(x, weight, labels, CHUNK)}
    try:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
    except ImportError:
        pass
    else:
        options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        found["torch_chunked"] = lambda: F.linear_cross_entropy(x, weight, labels, reduction="sum", options=options)
    found["torch_plain"] = lambda: F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
    return [x, weight], found


def main() -> None:
    """Time them in turns and print the medians in seconds."""
    keep_freed_memory()
    leaves, losses = candidates()
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(REPEATS + 1):
        for name, loss in losses.items():
            began = time.perf_counter()
            loss().backward()
            if repeat:
                times[name].append(time.perf_counter() - began)
            for leaf in leaves:
                leaf.grad = None
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    print(json.dumps({"bench": "loss", "tokens": TOKENS, "vocabulary": VOCABULARY, **medians}))


if __name__ == "__main__":
    main()

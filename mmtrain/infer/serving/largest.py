"""The largest logit of each document, found by few kernels and one message to the host.

Legend: N documents, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmtrain.infer.serving.ranks import ALONE, Ranks


class Largest:
    """Finds largest logits, and brings them to memory of the host that stays where it is.

    Args:
        vocab_size: ids of the tokenizer; the model's above it are never chosen.
        ranks: processes that choose the same.
    """

    def __init__(self, vocab_size: int, ranks: Ranks = ALONE) -> None:
        self._vocab_size, self._ranks = vocab_size, ranks
        self._here = torch.empty(0, dtype=torch.int64)

    def find(self, logits_NV: Tensor) -> tuple[list[int], bool]:
        """Return the id of each row's largest logit, of equal ones the first, and whether all are finite numbers.

        On a GPU these are two kernels and a copy, for which the host waits.

        Args:
            logits_NV: any floating dtype, on any device.
        """
        count, dtype = len(logits_NV), logits_NV.dtype
        found = torch.empty(count + 2, dtype=torch.int64, device=logits_NV.device)
        extremes = found[count:].view(dtype)
        torch.aminmax(logits_NV, out=(extremes[0], extremes[1]))  # a NaN anywhere is in both
        torch.argmax(logits_NV[:, : self._vocab_size], 1, out=found[:count])
        self._ranks.of_first(found[:count])
        here = self._on_host(found)
        return here[:count].tolist(), all(map(math.isfinite, here[count:].view(dtype)[:2].tolist()))

    def _on_host(self, found: Tensor) -> Tensor:
        """Wait for numbers; the next ones overwrite them."""
        if len(self._here) < len(found):
            self._here = torch.empty(len(found), dtype=torch.int64, pin_memory=found.device.type == "cuda")
        return self._here[: len(found)].copy_(found)

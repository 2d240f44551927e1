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
        count, dtype, device = logits_NV.shape[0], logits_NV.dtype, logits_NV.device
        found = torch.empty(count + 2, dtype=torch.int64, device=device)
        least, most = found[count:].view(dtype)[:2]
        torch.aminmax(logits_NV, out=(least, most))  # a NaN anywhere is in both
        torch.argmax(logits_NV[:, : self._vocab_size], 1, out=found[:count])
        self._ranks.of_first(found[:count])
        if self._here.shape[0] < count + 2:
            self._here = torch.empty(count + 2, dtype=torch.int64, pin_memory=device.type == "cuda")
        here = self._here[: count + 2]
        ids, extremes = here[:count], here[count:].view(dtype)[:2]
        here.copy_(found)  # the host waits here; what it does after, the device waits for
        return ids.tolist(), all(map(math.isfinite, extremes.tolist()))

"""The largest logit of each document, found by few kernels and one message to the host.

Legend: N documents, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.largest import largest_logits
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

        On a GPU these are two kernels, which read the logits once, and a copy, for which the host waits.

        Args:
            logits_NV: any floating dtype, on any device; columns contiguous.
        """
        found_2N = largest_logits(logits_NV, self._vocab_size)
        self._ranks.of_first(found_2N[0])
        size = found_2N.numel()
        if self._here.shape[0] < size:
            self._here = torch.empty(size, dtype=torch.int64, pin_memory=found_2N.is_cuda)
        here_2N = self._here[:size].view(2, -1)
        here_2N.copy_(found_2N)  # the host waits here; what it does after, the device waits for
        ids, finite = here_2N.tolist()
        return ids, all(finite)

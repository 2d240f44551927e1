"""The sequence-parallel region: the seam at which a token mixer or a dense feed-forward meets tokens of other ranks.

Under tensor parallelism a rank holds S = T / W consecutive tokens of a micro-batch between these modules, and works on
all T with its own heads or columns inside of them (Megatron-LM's sequence parallelism).

Legend: T tokens of a micro-batch, W ranks, S tokens of this rank, D model width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SequenceRegion(Protocol):
    """The two ends of a computation whose weights are split over ranks; Megatron-LM has functions of these names."""

    def gather_from(self, x_SD: Tensor) -> Tensor:
        """Return the tokens of all ranks, [T, D]; the gradient of this rank's is summed over ranks."""

    def reduce_scatter_to(self, partial_TD: Tensor) -> Tensor:
        """Return this rank's tokens [S, D] of the sum over ranks of their partial results."""


class WholeSequence:
    """All tokens and all weights lie on this device: nothing to gather or to sum."""

    def gather_from(self, x_SD: Tensor) -> Tensor:
        """Return x itself."""
        return x_SD

    def reduce_scatter_to(self, partial_TD: Tensor) -> Tensor:
        """Return the results themselves, which are whole."""
        return partial_TD

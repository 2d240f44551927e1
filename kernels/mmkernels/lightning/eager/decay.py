"""Powers of the decay, computed once per call. Every exponent is <= 0: exp(+s n) would overflow for large slopes.

Shape letters: H heads, C tokens of a chunk, N chunks of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecayTables:
    """Decay factors of one call, in the accumulation dtype.

    Attributes:
        scores_HCC: ``exp(-s (i-j))`` for i >= j, else 0: the causal decay inside a chunk.
        into_HC: ``exp(-s (i+1))``: weight of the state entering the chunk at token i.
        outof_HC: ``exp(-s (C-1-i))``: weight of token i in the state leaving the chunk.
        chunks_HNN: ``exp(-s C (c-j))`` for c >= j, else 0: from the state leaving chunk j to the one leaving chunk c.
        slopes_H: the slopes themselves.

    A shorter last chunk of r tokens uses slices of these: rows 0..r-1 of ``scores_HCC`` and ``into_HC`` and the last
    r entries of ``outof_HC``.
    """

    scores_HCC: Tensor
    into_HC: Tensor
    outof_HC: Tensor
    chunks_HNN: Tensor
    slopes_H: Tensor
    _segments: dict[int, Tensor] = field(default_factory=dict)

    def over(self, tokens: int) -> Tensor:
        """``exp(-s tokens)`` in float64, [H, 1, 1]: the decay of a state over a segment."""
        if tokens not in self._segments:
            self._segments[tokens] = torch.exp(-self.slopes_H.double() * tokens)[:, None, None]
        return self._segments[tokens]

    @staticmethod
    def build(slopes_H: Tensor, chunk: int, chunks: int, dtype: torch.dtype) -> DecayTables:
        """Tables for chunks of ``chunk`` tokens and segments of up to ``chunks`` chunks."""
        # float64 here costs nothing (H * C values) and leaves one rounding per factor.
        s_H1 = slopes_H.double()[:, None]
        steps = torch.arange(chunk + 1, dtype=torch.float64, device=slopes_H.device)
        powers_HC = torch.exp(-s_H1 * steps).to(dtype)
        chunk_powers_HN = torch.exp(-s_H1 * (chunk * steps.new_tensor(range(chunks)))).to(dtype)
        return DecayTables(
            scores_HCC=_lower_toeplitz(powers_HC[:, :chunk]),
            into_HC=powers_HC[:, 1:],
            outof_HC=powers_HC[:, :chunk].flip(-1),
            chunks_HNN=_lower_toeplitz(chunk_powers_HN),
            slopes_H=slopes_H,
        )


def powers(slopes_H: Tensor, lowest: int, count: int, dtype: torch.dtype) -> Tensor:
    """``exp(-s m)`` for m = lowest .. lowest + count - 1, as [count, H, 1] to scale tokens of a [T, H, D] tensor."""
    steps = torch.arange(lowest, lowest + count, dtype=torch.float64, device=slopes_H.device)
    return torch.exp(-slopes_H.double() * steps[:, None]).to(dtype).unsqueeze(-1)


def _lower_toeplitz(column_HN: Tensor) -> Tensor:
    """Matrix [H, N, N] with entry (i, j) = column[i-j] for i >= j and exactly 0 above the diagonal."""
    size = column_HN.shape[-1]
    if size == 0:
        return column_HN.new_zeros(*column_HN.shape, 0)
    # Reading "column reversed, then zeros" from a start that moves left by one per row gives row i.
    strip = torch.cat([column_HN.flip(-1), column_HN.new_zeros(column_HN.shape[0], size - 1)], dim=-1)
    return strip.unfold(-1, size, 1).flip(-2).contiguous()

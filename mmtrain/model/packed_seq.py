"""The places of documents in a flattened row of tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Offsets of documents of these lengths, from 0 to their sum; int32 [documents + 1], on the host."""
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return cu_seqlens


def documents_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number of each token's document, int64 [T], given where documents begin and end, int32 [N + 1]."""
    places_T = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(places_T, cu_seqlens[1:], right=True)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x


@dataclass(frozen=True)
class RealTokens:
    """Those of T flattened tokens that are not padding, with which rows may end.

    Attributes:
        index_M: int64 [M], their places among the T tokens, ascending.
        per_row: number of them in each row, on the host.
        row_length: tokens of a row, with its padding.
    """

    index_M: Tensor
    per_row: tuple[int, ...]
    row_length: int

    @staticmethod
    def from_rows(per_row: Sequence[int], row_length: int, device: torch.device | str = "cpu") -> RealTokens:
        """The first `per_row[b]` tokens of each row b of `row_length`; the host does not wait for the device."""
        index_M = torch.cat([torch.arange(b * row_length, b * row_length + n) for b, n in enumerate(per_row)])
        return RealTokens(to_device(index_M, device), tuple(per_row), row_length)


@dataclass(frozen=True)
class Packing:
    """Boundaries of the documents in T flattened tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1], first token of each document, then T; every row start is a boundary.
        position_ids_T: int64 [T], position of each token in its document.
        max_seqlen: the longest document, known without reading the device.
        lengths: tokens of each document, on the host. Where none are given, they are read from `cu_seqlens`, once; if
            that tensor is on a device, the host waits for the device.
        real: the tokens that are no padding; None if rows are never padded. The padding of a row is a document of its
            own to the mixers; nothing of it is routed, learned from or counted.
        plans: what :meth:`planned` has made.
    """

    cu_seqlens: Tensor
    position_ids_T: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] = ()
    real: RealTokens | None = None
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.lengths:
            object.__setattr__(self, "lengths", tuple(self.cu_seqlens.diff().tolist()))

    def planned(self, make: Callable[..., P], *given: Hashable) -> P:
        """Return what a function makes of this row and `given`: made for the first layer that asks, kept for others."""
        key = (make, *given)
        if key not in self.plans:
            self.plans[key] = make(self, *given)
        return self.plans[key]

    @property
    def row_tokens(self) -> int:
        """T, with padding; those of the whole micro-batch where several ranks share its rows."""
        return sum(self.lengths)

    @property
    def document_T(self) -> Tensor:
        """Number of each token's document, int64 [T], among those of the whole micro-batch."""
        return documents_of(self.cu_seqlens, self.row_tokens)

    @property
    def num_documents(self) -> int:
        """Documents of the whole micro-batch, padding among them."""
        return len(self.lengths)

    @property
    def speaks_for_rows(self) -> bool:
        """Whether figures of whole rows are this rank's to tell: the first's of the ranks that share them."""
        return True

    @property
    def balance(self) -> float:
        """Softmax work of the busiest of the ranks that share these rows over their mean; 1 where one has them."""
        return 1.0

    @property
    def real_lengths(self) -> tuple[int, ...]:
        """Tokens of each document that is not padding; of the whole micro-batch where ranks share its rows."""
        if self.real is None:
            return self.lengths
        size, per_row = self.real.row_length, self.real.per_row
        pieces = zip(accumulate(self.lengths, initial=0), self.lengths, strict=False)
        return tuple(n for begin, n in pieces if n and begin % size < per_row[begin // size])

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device | str = "cpu", start: int = 0) -> Packing:
        """Lay documents of these lengths end to end; the first position of each is `start`."""
        cu = offsets_of(lengths)
        first_T = torch.repeat_interleave(cu[:-1].long(), torch.tensor(lengths, dtype=torch.int64))
        positions_T = torch.arange(int(cu[-1])) - first_T + start
        return Packing(cu.to(device), positions_T.to(device), max(lengths, default=0), tuple(lengths))

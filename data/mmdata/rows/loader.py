"""Torch batches that a rank trains on, made of rows and read ahead by worker processes."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmdata.errors import DataError
from mmdata.rows.assemble import Row

_ORPHAN_SECONDS = 120
_Batch = TypeVar("_Batch", bound="PackedBatch")


class Rows(Protocol):
    """Protocol of a stream of rows: a `RowStream` or a `Mixture`."""

    def __getitem__(self, i: int) -> Row:
        """Row i, for any i >= 0."""


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of B rows of S tokens.

    Attributes:
        tokens_BS, labels_BS, position_ids_BS: int64[B, S].
        loss_mask_BS: bool[B, S].
        cu_seqlens: int32[n + 1], bounds of the pieces in the flattened B * S tokens; each row's start is one of them.
        rows: the stream's row numbers.
        max_seqlen: the longest piece in tokens, a Python int: asking for it never waits for a device.
        real_tokens: of each row, the tokens before its padding, on the host. None if these rows are of a packing that
            never pads: which of both it is must be the same for all batches of a run, full ones too.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: tuple[int, ...]
    max_seqlen: int = -1  # worked out when the batch is made, unless given
    real_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_seqlen < 0:
            object.__setattr__(self, "max_seqlen", int(self.cu_seqlens.diff().max()))

    @property
    def num_real_tokens(self) -> int:
        """Tokens without padding."""
        return self.tokens_BS.numel() if self.real_tokens is None else sum(self.real_tokens)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy the batch to `device`. From the CPU to a GPU through pinned memory, without waiting for the copy."""
        device = torch.device(device)
        pin = device.type == "cuda" and self.tokens_BS.device.type == "cpu"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)

        return replace(
            self,
            tokens_BS=move(self.tokens_BS),
            labels_BS=move(self.labels_BS),
            loss_mask_BS=move(self.loss_mask_BS),
            position_ids_BS=move(self.position_ids_BS),
            cu_seqlens=move(self.cu_seqlens),
        )


def collate(rows: Sequence[Row], numbers: Sequence[int]) -> PackedBatch:
    """Stack rows into a batch.

    Raises:
        DataError: no row, or B * S beyond what int32 bounds can count.
    """
    if not rows:
        raise DataError("a micro-batch of 0 rows: give at least one row number for each")
    s = len(rows[0].tokens)
    if len(rows) * s >= 1 << 31:
        raise DataError(f"a micro-batch of {len(rows)} rows of {s} tokens: 2^31 tokens is the limit, take fewer rows")
    bounds = [np.zeros(1, dtype=np.int32), *(row.cu_seqlens[1:] + np.int32(b * s) for b, row in enumerate(rows))]
    cu_seqlens = np.concatenate(bounds)

    def stack(arrays: list[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
        out = np.empty((len(arrays), s), dtype=dtype)
        for b, array in enumerate(arrays):
            out[b] = array
        return torch.from_numpy(out)

    return PackedBatch(
        tokens_BS=stack([row.tokens for row in rows], np.int64),
        labels_BS=stack([row.labels for row in rows], np.int64),
        loss_mask_BS=stack([row.loss_mask for row in rows], np.bool_),
        position_ids_BS=stack([row.position_ids for row in rows], np.int64),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        rows=tuple(int(number) for number in numbers),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        real_tokens=_real_tokens(rows, s),
    )


def _real_tokens(rows: Sequence[Row], s: int) -> tuple[int, ...] | None:
    """Tokens of each row before its padding; None if none of them can be padded."""
    if all(row.real_tokens is None for row in rows):
        return None
    return tuple(s if row.real_tokens is None else row.real_tokens for row in rows)


def micro_batches(
    stream: Rows,
    batches: Iterable[Sequence[int]],
    *,
    num_workers: int = 0,
    prefetch: int = 4,
    collate: Callable[[Sequence[Row], Sequence[int]], _Batch] = collate,
) -> Generator[_Batch]:
    """Make one batch of each list of row numbers in `batches` (which may be endless), in order.

    With `num_workers` processes, each process makes up to `prefetch` batches ahead of need, and as many lists are drawn
    from `batches`. The batches do not depend on either number. `collate` makes a batch of rows and their numbers, in
    this process.

    Raises:
        DataError: `stream` raised it, in whichever process; or `num_workers` is negative.
    """
    if num_workers < 0:
        raise DataError(f"num_workers is {num_workers}: it must be 0 or more")
    if num_workers == 0:
        for numbers in batches:
            yield collate([stream[i] for i in numbers], numbers)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has views on more workers than cores
        loader = DataLoader(
            _RowReader(stream),
            batch_sampler=_Lists(batches),
            num_workers=num_workers,
            prefetch_factor=max(1, prefetch),
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_rank,
        )
        iterator = iter(loader)
    try:
        for numbers, result in iterator:
            if isinstance(result, DataError):
                raise result
            yield collate(result, numbers)
    finally:
        del iterator  # ends the processes now; in a traceback's frame it would keep them


class _RowReader(torch.utils.data.Dataset[Any]):
    """Reads a whole micro-batch in one worker.

    Rows travel as numpy arrays through a pipe: torch tensors would go through shared memory, of which containers often
    have little. A DataError travels as a value, since DataLoader would bury its one line in a traceback.
    """

    def __init__(self, stream: Rows) -> None:
        self._stream = stream

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Sequence[int], list[Row] | DataError]:
        try:
            return numbers, [self._stream[i] for i in numbers]
        except DataError as error:
            return numbers, error


class _Lists:
    """Batch sampler without a length, over the caller's lists of row numbers."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self._batches)


def _as_is(result: Any) -> Any:
    return result


def _leave_signals_to_the_rank(worker: int) -> None:
    """Let a worker outlive the signals that ask its whole process group to stop: the rank still needs its rows.

    torchrun sends SIGTERM to the group once more, so their number says nothing. Python sends it too where the rank has
    ended without closing its workers, and then waits for them: they end two minutes after the first.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(signal.alarm(0) or _ORPHAN_SECONDS))

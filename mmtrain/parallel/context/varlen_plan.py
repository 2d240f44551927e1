"""Where keys lie, and where their gradients go, if one call has all keys of each piece of queries one after another.

A piece of queries is a part of a document on this rank, neighbouring chunks joined. Its keys are those of its document
from the first token to the piece's last: earlier tails, copied to every piece that needs them, and the piece's own.
Everything is arithmetic on the host, done once for a row; the indices go to the device in one copy.

Legend: S tokens here; B keys of all pieces; W tails of other ranks that pieces here need (received), then those of this
rank that pieces here need (its own); P tokens here that any rank's pieces need as tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mmkernels.softmax import Suffixes
from mmtrain.model.packed_seq import to_device
from mmtrain.parallel.context.softmax_parts import LocalPart
from mmtrain.parallel.context.tail_plan import TailPlan

Share = tuple[int, slice]
"""Another rank, and the rows of a buffer that go there or come from there."""


@dataclass(frozen=True)
class OrderedSum:
    """Sums of the rows of a tensor that have the same target, added one after another in the order of the rows.

    On a GPU too: within one step no two rows have the same target.

    Attributes:
        first: the first row of each target.
        further: targets, and the second row of each; then those that have a third, and so on.
    """

    first: Tensor
    further: tuple[tuple[Tensor, Tensor], ...]

    def write(self, total: Tensor, parts: Tensor) -> None:
        """Write the sums, in the dtype of `total`."""
        total.copy_(parts.index_select(0, self.first))
        for targets, rows in self.further:
            total.index_add_(0, targets, parts.index_select(0, rows).to(total.dtype))


@dataclass(frozen=True)
class VarlenPlan:
    """One rank's part of the call.

    Attributes:
        documents: queries and keys of every piece.
        source_B: where each key lies among the S tokens here and, behind them, the received tails.
        own_S: where among the B keys each token here is the key of its own piece.
        send_index: tokens here that other ranks receive, for one rank after another.
        sends: rows of those for each rank.
        receives: rows of the received tails that come from each rank.
        kept_tails: tails in all, W: the received ones, then this rank's own.
        copies: sums the gradients of the B keys into those of the W tails.
        owners: sums the gradients of this rank's tails (its own part, then what each rank returns, in the order of
            `sends`) into P.
        shared_P: which of the S tokens they are.
    """

    documents: Suffixes
    source_B: Tensor
    own_S: Tensor
    send_index: Tensor
    sends: tuple[Share, ...]
    receives: tuple[Share, ...]
    kept_tails: int
    copies: OrderedSum
    owners: OrderedSum
    shared_P: Tensor

    @property
    def received(self) -> int:
        """Tokens of the tails that come from other ranks."""
        return self.receives[-1][1].stop if self.receives else 0

    @staticmethod
    def of(plan: TailPlan, local: LocalPart) -> VarlenPlan:
        """Plan a row; the host does not wait for the device."""
        shard, rank, tail_M = plan.shard, plan.rank, plan.shard.tail_M
        others = [r for r in range(len(shard.table)) if r != rank]
        wanted = {r: [c for c in shard.table[r] if plan.needs_RM[rank, c]] for r in others}
        given = {r: [c for c in shard.chunks if plan.needs_RM[r, c]] for r in others}
        mine = [c for c in shard.chunks if plan.needs_RM[rank, c]]
        receives, sends = _shares(wanted, tail_M), _shares(given, tail_M)
        tails = [*(c for chunks in wanted.values() for c in chunks), *mine]  # the W tails
        place = dict(zip(tails, _follow(0, tail_M[tails]), strict=True))
        source = {c: slice(shard.num_tokens + rows.start, shard.num_tokens + rows.stop) for c, rows in place.items()}
        source |= {c: plan.tail_rows(c) for c in mine}
        source_B, target_B, keys = _pieces(plan, local, source, place)

        sent_rows = [plan.tail_rows(c) for chunks in given.values() for c in chunks]
        returned = _range([*(source[c] for c in mine), *sent_rows])
        shared_P, owner = np.unique(returned, return_inverse=True)
        copy_B = np.flatnonzero(target_B >= 0)
        copies, owners = _ordered(target_B[copy_B], copy_B), _ordered(owner, np.arange(len(owner)))
        cu_queries, cu_keys = (np.cumsum([0, *lengths], dtype=np.int64) for lengths in (local.lengths, keys))
        arrays = [cu_queries, cu_keys, source_B, np.flatnonzero(target_B < 0), _range(sent_rows), shared_P]
        found = _upload([*arrays, *copies, *owners], local.cu_seqlens.device)
        cu_queries, cu_keys, source_B, own_S, send_index, shared_P, *sums = found
        documents = Suffixes(local.lengths, tuple(keys), cu_queries.int(), cu_keys.int())
        return VarlenPlan(
            documents, source_B, own_S, send_index, sends, receives, int(tail_M[tails].sum()),
            _sum_of(sums[: len(copies)]), _sum_of(sums[len(copies) :]), shared_P,
        )  # fmt: skip


def _pieces(
    plan: TailPlan, local: LocalPart, source: dict[int, slice], place: dict[int, slice]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Of each of the B keys where it lies, and among the W tails its place, -1 for a piece's own; keys of each piece.

    Args:
        plan: the row.
        local: whose lengths are the pieces.
        source: where each tail lies.
        place: its rows among the W.
    """
    earlier = {x.rows.start: range(x.first, x.stop) for x in plan.rectangles}
    sources, targets, keys = [], [], []
    for own in _follow(0, local.lengths):
        tails, begin = earlier.get(own.start, ()), len(sources)
        sources += [*(source[c] for c in tails), own]
        targets += [_range([place[c] for c in tails]), np.full(own.stop - own.start, -1)]
        keys.append(sum(rows.stop - rows.start for rows in sources[begin:]))
    return _range(sources), np.concatenate([_range([]), *targets]), keys


def _follow(start: int, lengths: Sequence[int]) -> list[slice]:
    """Rows of things that lie one after another."""
    edges = [start, *(start + int(x) for x in np.cumsum(lengths, dtype=np.int64))]
    return [slice(low, high) for low, high in pairwise(edges)]


def _shares(chunks: dict[int, list[int]], tail_M: np.ndarray) -> tuple[Share, ...]:
    """Rows of each rank's chunks, one rank after another."""
    return tuple(zip(chunks, _follow(0, [int(tail_M[mine].sum()) for mine in chunks.values()]), strict=True))


def _range(slices: Sequence[slice]) -> np.ndarray:
    """Numbers of all rows."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(x.start, x.stop, dtype=np.int64) for x in slices)])


def _ordered(target: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """First row of each target; then, for second ones and so on, targets and rows. Every target has one row or more."""
    order = np.argsort(target, kind="stable")
    target, rows = target[order], rows[order]
    _, begin, count = np.unique(target, return_index=True, return_counts=True)
    turn = np.arange(len(target)) - np.repeat(begin, count)
    found = [rows[turn == 0]]
    for step in range(1, int(count.max(initial=1))):
        found += [target[turn == step], rows[turn == step]]
    return found


def _sum_of(tensors: Sequence[Tensor]) -> OrderedSum:
    return OrderedSum(tensors[0], tuple(zip(tensors[1::2], tensors[2::2], strict=True)))


def _upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, int64, by one copy."""
    flat = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    return list(flat.split([len(x) for x in arrays]))

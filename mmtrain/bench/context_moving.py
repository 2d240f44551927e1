"""What a second order of tokens would cost: hidden states moved to it before a softmax layer, and back after it.

With one order for both kinds of layers, lightning layers have as many chunks a rank as the balance of softmax layers
asks for. With an order of their own, one chunk a rank, they lose less (`mmtrain.bench.context_lightning` measures
both), and each softmax layer pays four all-to-alls: there and back, forward and backward.

Legend: S tokens of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mmtrain.bench.context_report import Bench, Figures
from mmtrain.bench.context_rows import cut_row, short_documents
from mmtrain.bench.timing import timed_apart
from mmtrain.parallel.collectives import exchange_rows


class Move:
    """The way of a rank's tokens between the contiguous order and the balanced one."""

    def __init__(self, bench: Bench, lengths: Sequence[int], chunks: int) -> None:
        self._group, rank, ranks = bench.group, bench.rank, bench.ranks
        tokens = sum(lengths) // ranks
        owner_T = torch.empty(sum(lengths), dtype=torch.long)
        for one in range(ranks):
            owner_T[cut_row(lengths, ranks, one, "balanced", chunks, torch.device("cpu")).index_S] = one
        mine_S = owner_T[rank * tokens : (rank + 1) * tokens]
        self._send = torch.bincount(mine_S, minlength=ranks).tolist()
        here_T = (owner_T == rank).view(ranks, tokens)
        self._receive = here_T.sum(1).tolist()
        order_S = torch.argsort(mine_S, stable=True)
        self._order_S, self._undo_S = (x.to(bench.device) for x in (order_S, torch.argsort(order_S)))
        self.share = 1 - self._send[rank] / tokens

    def there(self, x_SD: Tensor) -> Tensor:
        """Hidden states of this rank's tokens in the balanced order, out of those in the contiguous one."""
        return exchange_rows(x_SD.index_select(0, self._order_S), self._receive, self._send, self._group)

    def back(self, x_SD: Tensor) -> Tensor:
        """The other way."""
        return exchange_rows(x_SD, self._send, self._receive, self._group).index_select(0, self._undo_S)


def measure_moving(bench: Bench, width: int, dtype: torch.dtype, lengths: Sequence[int]) -> None:
    """Measure the four exchanges of a softmax layer at each number of tokens a GPU."""
    for tokens in lengths:
        label = {"tokens": tokens, "table": "balanced", "chunks": 8}
        bench.case("moving", label, partial(_moved, bench, width, dtype, tokens))


def _moved(bench: Bench, width: int, dtype: torch.dtype, tokens: int) -> Figures:
    move = Move(bench, short_documents(tokens * bench.ranks), 8)
    x_SD = torch.randn(tokens, width, device=bench.device, dtype=dtype, requires_grad=True)
    dy_SD = torch.randn_like(x_SD)
    *times, (y_SD, dx_SD) = timed_apart(lambda: move.back(move.there(x_SD)), [x_SD], dy_SD, bench.seconds)
    if not (torch.equal(y_SD, x_SD) and torch.equal(dx_SD, dy_SD)):
        raise ArithmeticError("tokens did not come back to their places")
    forward, backward = (round(ms, 3) for ms in times)
    return {
        "moved": round(move.share, 3),
        "forward_ms": forward,
        "backward_ms": backward,
        "both_ms": round(sum(times), 3),
    }

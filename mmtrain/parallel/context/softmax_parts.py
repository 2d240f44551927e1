"""Parts of softmax attention across ranks that do not depend on how keys come: the local part, buffers of tails, sums.

Legend: S tokens here, H heads, G key/value heads, g of them in a group, K head width, P tokens of a buffer of tails;
a buffer [P, 2, g, K] has keys and values beside each other, so that a chunk's tail is one message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.softmax import softmax_attention_with_lse, softmax_packed_backward
from mmtrain.model.packed_seq import offsets_of, to_device
from mmtrain.parallel.context.row_shard import ContextPacking
from mmtrain.parallel.context.tail_plan import TailPlan

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LocalPart:
    """Attention among the tokens of this rank, where neighbouring chunks are one.

    Attributes:
        cu_seqlens: int32, offsets of the parts of documents, on the device.
        lengths: the same on the host.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(plan: TailPlan, packing: ContextPacking) -> LocalPart:
        """That of a row; the host does not wait for the device."""
        if plan.lengths == packing.lengths:
            return LocalPart(packing.cu_seqlens, plan.lengths)
        return LocalPart(to_device(offsets_of(plan.lengths), packing.cu_seqlens.device), plan.lengths)

    def forward(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> tuple[Tensor, Tensor]:
        """Output [S, H, K] and log-sum-exp [H, S], in memory of their own."""
        return softmax_attention_with_lse(q_SHK.detach(), k_SGK.detach(), v_SGK.detach(), self.cu_seqlens, self.lengths)

    def backward(
        self, do_SHK: Tensor, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, o_SHK: Tensor, lse_HS: Tensor
    ) -> Grads:
        """What the local keys add to the gradients, and their own, for output and log-sum-exp over all keys."""
        return softmax_packed_backward(do_SHK, q_SHK, k_SGK, v_SGK, o_SHK, lse_HS, self.cu_seqlens, self.lengths)


def pack_tails(k_SGK: Tensor, v_SGK: Tensor, plan: TailPlan, heads: slice) -> Tensor:
    """This rank's shared tails of a group of key/value heads, [P, 2, g, K]."""
    rows = [plan.tail_rows(chunk) for chunk in plan.shared.chunks]
    count = len(range(*heads.indices(k_SGK.shape[1])))
    kv_P2gK = k_SGK.new_empty(plan.shared.tokens, 2, count, k_SGK.shape[2])
    for place, x in enumerate((k_SGK, v_SGK)):
        if rows:
            torch.cat([x.detach()[r, heads] for r in rows], out=kv_P2gK[:, place])
    return kv_P2gK


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parts of a result are added up: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class GradientSum:
    """dq, dk and dv: the local part's, to which all others are added, each place rounded once by each part.

    Parts may come before the local part is computed: they are kept until then.
    """

    def __init__(self, local: Callable[[], Grads]) -> None:
        self._local = local
        self._totals: Grads | None = None
        self._early: list[tuple[int, slice, slice, Tensor]] = []

    def compute_local(self) -> None:
        """Compute the local part, and add what came before; the second call does nothing."""
        if self._totals is None:
            self._totals = self._local()
            for part in self._early:
                self._add(*part)
            self._early.clear()

    def add(self, which: int, rows: slice, heads: slice, part: Tensor) -> None:
        """Add a part to rows and heads of dq (0), dk (1) or dv (2); the sum is in float32 at least, rounded once."""
        if self._totals is None:
            self._early.append((which, rows, heads, part))
        else:
            self._add(which, rows, heads, part)

    def totals(self) -> Grads:
        """All three, in the dtype of q."""
        self.compute_local()
        return self._totals

    def _add(self, which: int, rows: slice, heads: slice, part: Tensor) -> None:
        self._totals[which][rows, heads].add_(part)  # of two dtypes, the wider is computed in

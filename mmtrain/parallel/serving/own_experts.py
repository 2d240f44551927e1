"""Experts of ranks that all hold the same tokens: each rank runs its own on all of them, and results are summed.

Nothing is sent to an expert: its tokens are there. One all-reduce of [T, D] over the ranks of ep and etp, for parts of
sums and for slices of an expert's width alike, takes the place of two all-to-alls, of the gather of their results (as
every rank goes on with all tokens), and of the counts that the host would wait for. It moves about 2 T D elements a
rank; they would move T D + 2 K T D / W. At decode the number of messages counts, and that no router decides a shape: a
rank whose experts get no token does the same as the others.

Legend: T tokens, D model width, E experts of all ranks, L consecutive ones of this rank, K experts a token, R = T * K
rows, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.moe import Route, permute, unpermute
from mmtrain.model.moe.experts import Experts
from mmtrain.parallel.collectives import sum_in_place


class OwnExperts:
    """The model's `ExpertCall` where ranks have some experts each, or slices of their width.

    Args:
        place: of this rank along ep.
        ranks: along ep, among which the experts are shared out evenly.
        group: all ranks of ep and etp.
    """

    def __init__(self, place: int, ranks: int, group: ProcessGroup) -> None:
        self._place, self._ranks, self._group = place, ranks, group

    def __call__(self, experts: Experts, x_TD: Tensor, plan: Route) -> Tensor:
        """Return the weighted sum over each token's experts of all ranks, [T, D], alike on each.

        A rank to whose experts no token goes adds zeros.
        """
        count = plan.count_E.numel() // self._ranks
        own = experts_of(plan, self._place * count, count)
        y_RD = experts.products(permute(x_TD, own), own.offset_E)
        return sum_in_place(unpermute(y_RD, own.weight_TK, own), self._group)


def experts_of(plan: Route, first: int, count: int) -> Route:
    """The plan of the experts `first` to `first + count` alone: assignments to others are as if dropped.

    As many rows are set aside as before, so that nothing waits for the device; those of these experts come first.
    """
    end = first + count
    offset_E = plan.offset_E[first:end]
    before = plan.offset_E[first - 1] if first else torch.zeros_like(plan.offset_E[0])
    own_TK = (plan.expert_TK >= first) & (plan.expert_TK < end) & (plan.row_TK >= 0)
    rows = plan.token_R.shape[0]
    row_R = torch.arange(rows, device=offset_E.device)
    token_R = plan.token_R[(row_R + before).clamp(max=max(rows - 1, 0))]
    return plan._replace(
        row_TK=torch.where(own_TK, plan.row_TK - before, -1).int(),
        token_R=torch.where(row_R < offset_E[-1] - before, token_R, -1).int(),
        count_E=plan.count_E[first:end],
        assigned_E=plan.assigned_E[first:end],
        offset_E=(offset_E - before).int(),
    )

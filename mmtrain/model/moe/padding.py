"""The route of a micro-batch some of whose tokens are padding, which no router takes.

Legend: N tokens with padding, M tokens without, E experts, K experts a token, R rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmkernels.moe import Route, static_rows


def around_padding(plan: Route, index_M: Tensor, tokens: int, capacity: int | None) -> Route:
    """The route of all N tokens, given that of the M that are no padding. Nothing waits for the device.

    Padding has no row, so that experts give it zeros; its experts are named 0 and weigh 0, and no count has them.

    Args:
        plan: of the M tokens.
        index_M: int64, their places among the N, ascending.
        tokens: N.
        capacity: the most that an expert may keep of N tokens, as :class:`Route` says, at least that of `plan`: the
            number of rows follows from it, so that it is the same for all micro-batches.
    """
    shape = (tokens, plan.weight_TK.shape[1])
    weight_NK = plan.weight_TK.new_zeros(shape).index_copy(0, index_M, plan.weight_TK)
    expert_NK = plan.expert_TK.new_zeros(shape).index_copy_(0, index_M, plan.expert_TK)
    row_NK = plan.row_TK.new_full(shape, -1).index_copy_(0, index_M, plan.row_TK)
    token_R = index_M.index_select(0, plan.token_R.clamp(min=0)).int().masked_fill_(plan.token_R < 0, -1)
    unused = static_rows(*shape, plan.count_E.numel(), capacity) - token_R.shape[0]
    return plan._replace(
        weight_TK=weight_NK,
        expert_TK=expert_NK,
        row_TK=row_NK,
        token_R=F.pad(token_R, (0, unused), value=-1),
        capacity=capacity,
    )

"""The definition of permute and unpermute in plain torch, on any device, differentiated by autograd.

Legend: T tokens, D model width, K experts a token, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.moe.route_types import Route


def naive_permute(x_TD: Tensor, route: Route) -> Tensor:
    """Each row's token, and zeros in unused rows, [R, D], as `mmkernels.moe.permute`; any floating dtype."""
    return x_TD.index_select(0, route.token_R.clamp(min=0)).masked_fill_(route.token_R[:, None] < 0, 0)


def naive_unpermute(y_RD: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
    """Weighted sum of each token's rows, [T, D], as `mmkernels.moe.unpermute`; any floating dtype, in fp32 or wider."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    out_TD = y_RD.new_zeros(route.row_TK.shape[0], y_RD.shape[1], dtype=wide)
    for weight_T, row_T in zip(weight_TK.unbind(1), route.row_TK.unbind(1), strict=True):
        product_TD = y_RD.index_select(0, row_T.clamp(min=0)).to(wide) * weight_T.to(wide)[:, None]
        out_TD += product_TD.masked_fill_(row_T[:, None] < 0, 0)
    return out_TD.to(y_RD.dtype)

"""A rank's own experts: their parts of a mixture sum to all of it, also where a rank gets no token."""

from __future__ import annotations

import pytest
import torch

from mmkernels.moe import permute, route, unpermute
from mmtrain.model.moe.experts import Experts, LocalExperts
from mmtrain.parallel.serving.own_experts import experts_of
from tests.model.small import draw


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("chosen", ["any", "the first two"])
def test_parts_sum_to_the_mixture(tokens: int, ranks: int, chosen: str) -> None:
    experts = Experts(6, 16, 8)
    for weight in experts.parameters():
        weight.data = draw(*weight.shape, seed=weight.ndim, dtype=torch.float32)
    logits_TE = draw(tokens, 6, dtype=torch.float32) * (chosen == "any")  # of equal logits the lower come first
    x_TD, plan = draw(tokens, 16, seed=1, dtype=torch.float32), route(logits_TE, 2, None, "probs")
    with torch.no_grad():
        total_TD = torch.zeros_like(x_TD)
        for rank in range(ranks):
            count = 6 // ranks
            own = experts_of(plan, rank * count, count)
            assert own.count_E.sum() == own.offset_E[-1] == (own.row_TK >= 0).sum()
            part = Experts(count, 16, 8)
            for mine, whole in zip(part.parameters(), experts.parameters(), strict=True):
                mine.data = whole.data[rank * count :][:count]
            total_TD += unpermute(part.products(permute(x_TD, own), own.offset_E), own.weight_TK, own)
        torch.testing.assert_close(total_TD, LocalExperts()(experts, x_TD, plan), rtol=0, atol=1e-5)

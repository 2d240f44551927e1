"""The largest logits of documents: ids, and whether all logits are numbers."""

from __future__ import annotations

import pytest
import torch

from mmtrain.infer.serving.largest import Largest
from tests.model.small import draw

KNOWN, WIDTH = 90, 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ids_are_those_of_argmax_whatever_was_found_before(dtype: torch.dtype) -> None:
    largest = Largest(KNOWN)
    for count in (3, 64, 1):
        logits_NV = draw(count, WIDTH, seed=count).to(dtype)
        logits_NV[0, :5] = logits_NV[0].max() + 1  # equal ones
        logits_NV[:, KNOWN:] = 20
        ids, are_finite = largest.find(logits_NV)
        assert ids == logits_NV[:, :KNOWN].argmax(1).tolist() and ids[0] == 0
        assert are_finite is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, KNOWN, WIDTH - 1])
def test_one_that_is_no_number_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    logits_NV = draw(3, WIDTH).to(dtype)
    logits_NV[1, place] = value
    largest = Largest(KNOWN)
    assert largest.find(logits_NV)[1] is False
    assert largest.find(draw(2, WIDTH).to(dtype))[1] is True

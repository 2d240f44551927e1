"""Sums of the parts of a weight's gradient, against float64."""

from __future__ import annotations

import pytest
import torch

from mmkernels.common.weight_sums import BLOCK_P, weight_gradient
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "width"), [(0, 40), (1, 1), (3, 33), (BLOCK_P, 32), (BLOCK_P + 1, 70), (5 * BLOCK_P - 1, 256)]
)
def test_every_part_and_column(parts: int, width: int, dtype: torch.dtype) -> None:
    part = torch.randn(parts, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found, wanted = weight_gradient(part, dtype), part.double().sum(0)
    assert found.dtype == dtype and found.shape == (width,)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # the interpreter cuts bits off where a GPU rounds
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)

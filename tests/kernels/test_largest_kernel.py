"""The largest logit of rows and whether they are finite, on every backend, as torch's argmax and isfinite tell it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.largest import largest_logits, launch
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]
# Rows, columns and those of them that are known: parts of one block and of several, whole and not, known to their
# middle, to their end, and not at all.
SHAPES = [(1, 1, 1), (3, 5, 4), (1, 64, 64), (2, 65, 64), (7, 257, 200), (12, 1000, 1000), (5, 2011, 1987),
          (2, 700, 3), (1, 3000, 2999), (24, 130, 129)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks_and_garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BLOCK", 64)
    fill_new_memory(monkeypatch)


def draw(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Logits with many equal ones, and gaps between rows that hold NaN."""
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    wide = torch.full((rows, columns + 16), torch.nan)
    wide[:, :columns] = (torch.randn(rows, columns, generator=generator) * 3).round()
    return wide.to(DEVICE, dtype)[:, :columns]


def assert_found(logits: Tensor, known: int, backend: str) -> None:
    """Both answers are torch's, in int64."""
    found = largest_logits(logits, known, backend=backend)
    assert found.dtype == torch.int64 and found.device == logits.device
    assert found[0].tolist() == logits[:, :known].argmax(1).tolist()
    assert found[1].tolist() == torch.isfinite(logits).all(1).long().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_of_the_largest(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    rows, columns, known = shape
    logits = draw(rows, columns, dtype)
    assert_found(logits, known, backend)
    logits[:, known:] = 99.0
    assert_found(logits, known, backend)
    logits[:, known // 2] = 50.0
    logits[:, known - 1] = 50.0
    assert_found(logits, known, backend)
    assert_found(logits, columns + 7, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -60000.0, -torch.inf, torch.inf, torch.nan])
def test_rows_of_equal_values(value: float, backend: str) -> None:
    for dtype in DTYPES:
        assert_found(torch.full((3, 901), value, dtype=dtype, device=DEVICE), 850, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_of_both_signs_are_equal(backend: str) -> None:
    for first, then in ((0.0, -0.0), (-0.0, 0.0)):
        logits = torch.full((2, 500), then, device=DEVICE)
        logits[:, :7] = -1.0
        logits[0, 7] = logits[1, 300] = first
        assert_found(logits, 500, backend)
        assert largest_logits(logits, 500, backend=backend)[0].tolist() == [7, 7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 63, 64, 900, 2009, 2010, 2011, 2099])
def test_one_that_is_not_finite_shows_in_its_row_alone(place: int, value: float, backend: str) -> None:
    for dtype in DTYPES:
        logits = draw(3, 2100, dtype)
        logits[1, place] = value
        assert_found(logits, 2011, backend)  # from there on ids are not known
        assert largest_logits(logits, 2011, backend=backend)[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_nan_is_found_and_no_number_after_it(backend: str) -> None:
    logits = draw(4, 2100, torch.float32)
    logits[0, [200, 1999]] = torch.nan
    logits[1, [130, 194]] = torch.nan  # in one lane
    logits[1, 258] = 1e9  # there, later
    logits[2, [2020, 2099]] = torch.nan  # not known
    logits[3, 100], logits[3, 101] = torch.inf, torch.nan
    assert_found(logits, 2011, backend)
    assert largest_logits(logits, 2011, backend=backend)[0].tolist()[:2] == [200, 130]


@pytest.mark.parametrize("rows", [1, 2, 9, 64, 5000])
def test_parts_fill_a_device_and_cover_a_row(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BLOCK", 1024)
    blocks = launch.blocks_of_part(rows, 200_064, 132)
    parts = -(-200_064 // (blocks * 1024))
    assert parts * rows >= 132 and (parts * rows <= 132 * launch.PROGRAMS or parts == 1)


def test_wrong_arguments_are_refused_by_name() -> None:
    logits = draw(4, 10, torch.float32)
    for name, call in {
        "logits_NV": lambda: largest_logits(logits.T, 4),
        "logits_NV: got shape": lambda: largest_logits(logits[:0], 4),
        "logits_NV: got dtype": lambda: largest_logits(logits.long(), 4),
        "known": lambda: largest_logits(logits, 0),
        "backend": lambda: largest_logits(logits, 4, backend="cuda"),
        "logits_NV: got dtype torch.float64": lambda: largest_logits(logits.double(), 4, backend="triton"),
    }.items():
        with pytest.raises(KernelArgumentError, match=name):
            call()

"""Statistics and gradients of rows of logits against float64, on every backend; rows split over ranks by columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.cross_entropy import launch, logits_to_gradient_, row_statistics
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]
SHAPES = [(1, 1), (3, 5), (7, 257), (40, 1000), (5, 20_011), (0, 9), (4, 0)]


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


@pytest.fixture(autouse=True)
def many_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ROW_BLOCK", 512)
    monkeypatch.setattr(launch, "BLOCK", 256)


def problem(tokens: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 31 + columns)
    logits = (torch.randn(tokens, columns, generator=generator) * scale).to(DEVICE, dtype)
    labels = torch.randint(-2, columns + 2, (tokens,), generator=generator).to(DEVICE)  # some are no column here
    labels[:1] = -100
    labels[1:2] = columns - 1
    return logits, labels


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics, and softmax - onehot, in float64."""
    wide, own = logits.double(), (labels >= 0) & (labels < logits.shape[1])
    if not logits.shape[1]:
        return torch.tensor([-torch.inf, 0, 0], device=DEVICE).double()[:, None].expand(3, len(labels)), wide
    top = wide.max(1).values
    onehot = torch.zeros_like(wide)
    onehot[own, labels[own]] = 1
    label = (wide * onehot).sum(1)
    return torch.stack([top, (wide - top[:, None]).exp().sum(1), label]), wide.softmax(1) - onehot


def run(logits: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Statistics, and the gradient formed from them."""
    stats = row_statistics(logits, labels, backend=backend)
    top, total, label = stats
    written = logits.clone()
    got = logits_to_gradient_(written, labels, top, total, (label - top - total.log()).expm1(), backend=backend)
    assert got is written
    return stats, got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    logits, labels = problem(*shape, dtype)
    stats, gradient = run(logits, labels, backend)
    assert stats.dtype == torch.float32 and gradient.dtype == dtype
    expected_stats, expected = exact(logits, labels)
    torch.testing.assert_close(stats.double(), expected_stats, rtol=3e-6, atol=0)
    # Twice a rounding: the interpreter cuts bits off.
    step = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradient.double(), expected, rtol=step + 1e-5, atol=2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_several_ranks_join(backend: str) -> None:
    logits, _ = problem(6, 1000, torch.float32)
    labels = torch.tensor([0, 299, 300, 301, 999, -100], device=DEVICE)
    parts = [logits[:, :300].contiguous(), logits[:, 300:300].contiguous(), logits[:, 300:].contiguous()]
    firsts = [0, 300, 300]
    stats = [row_statistics(x, labels - first, backend=backend) for x, first in zip(parts, firsts, strict=True)]
    top = torch.stack([s[0] for s in stats]).amax(0)
    total = sum(s[1] * (s[0] - top).exp() for s in stats)
    log_prob = sum(s[2] for s in stats) - top - total.log()
    for x, first in zip(parts, firsts, strict=True):
        logits_to_gradient_(x, labels - first, top, total, log_prob.expm1(), backend=backend)
    torch.testing.assert_close(torch.cat(parts, 1).double(), exact(logits, labels)[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sure_predictions_keep_the_digits_of_their_gradient(backend: str) -> None:
    logits = torch.zeros(1, 1000, device=DEVICE)
    logits[0, 700] = 18.0
    labels = torch.tensor([700], device=DEVICE)
    gradient = run(logits, labels, backend)[1]
    torch.testing.assert_close(gradient[0, 700].double(), exact(logits, labels)[1][0, 700], rtol=2e-2, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_large_logits_do_not_overflow(value: float, backend: str) -> None:
    logits, labels = problem(5, 700, torch.float32)
    stats, gradient = run(logits + value, labels, backend)
    assert stats.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), exact(logits + value, labels)[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_are_ruled_out_get_no_gradient(backend: str) -> None:
    logits, labels = problem(4, 1100, torch.float32)
    logits[:, :600] = -torch.inf  # a first block, and more, of nothing else
    labels = labels.clamp(min=600)
    stats, gradient = run(logits, labels, backend)
    expected_stats, expected = exact(logits[:, 600:], labels - 600)
    torch.testing.assert_close(stats.double(), expected_stats, rtol=3e-6, atol=0)
    assert (gradient[:, :600] == 0).all()
    torch.testing.assert_close(gradient[:, 600:].double(), expected, rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_shows_in_its_row_alone(backend: str) -> None:
    logits, labels = problem(3, 700, torch.float32)
    logits[1, 650] = torch.nan
    stats, gradient = run(logits, labels, backend)
    assert stats[1].isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert not gradient[[0, 2]].isnan().any()


def test_wrong_arguments_are_refused_by_name() -> None:
    logits, labels = problem(4, 10, torch.float32)
    norm = torch.zeros(4, device=DEVICE)
    for name, call in {
        "logits_CV": lambda: row_statistics(logits.T, labels),
        "labels_C": lambda: row_statistics(logits, labels[:3]),
        "backend": lambda: row_statistics(logits, labels, backend="cuda"),
        "top_C": lambda: logits_to_gradient_(logits, labels, norm.double(), norm, norm),
        "sum_C": lambda: logits_to_gradient_(logits, labels, norm, norm[:, None], norm),
        "at_label_C": lambda: logits_to_gradient_(logits, labels, norm, norm, norm[:2]),
    }.items():
        with pytest.raises(KernelArgumentError, match=name):
            call()

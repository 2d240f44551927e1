"""Outputs and every gradient of the chunked backend against the float64 recurrence under plain autograd."""

from __future__ import annotations

import pytest
import torch

from mmkernels import lightning_attention
from mmkernels.lightning.eager import autograd, plan
from tests.kernels.lightning_cases import SLOPES, assert_close, double_loop, make_problem, run

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000]
PACKED = {
    "many in one chunk": [0, 1, 2, 3, 7, 7, 20, 21, 30],
    "empty at both ends": [0, 0, 0, 40, 40, 90, 90],
    "cuts on the grid": [0, 32, 64, 128, 256],
    "spans many chunks": [0, 3, 300, 301, 400],
    "odd": [0, 0, 1, 64, 65, 65, 128, 130, 399, 400, 400],
    "one": [0, 77],
    "only empty ones": [0, 0, 0],
}


@pytest.fixture(params=["cached plan", "many segments"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run once as shipped and once with segments of two chunks, one head at a time, and recomputed states."""
    if request.param == "many segments":
        monkeypatch.setattr(plan, "MAX_CHUNKS", 2)
        monkeypatch.setattr(plan, "SCORE_BYTES_PER_THREAD", 1)
        monkeypatch.setattr(plan, "chunk_length", lambda tokens, width: max(1, min(tokens, 16)))
        monkeypatch.setattr(autograd, "DENSE_STATE_BYTES", 0)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, 9, 20]])
def test_naive_is_the_double_loop(cu_seqlens: list[int] | None) -> None:
    problem = make_problem(20, batch=1 if cu_seqlens else 2, widths=(3, 5), cu_seqlens=cu_seqlens, states=False)
    torch.testing.assert_close(run(problem, "naive")["o"], double_loop(problem), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths_and_slopes(tokens: int) -> None:
    problem = make_problem(tokens)
    want = run(problem, "naive")
    assert_close(run(problem, "chunked"), want, BOUNDS[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 65, 257, 1000])
def test_lower_precision(tokens: int, dtype: torch.dtype) -> None:
    problem = make_problem(tokens, dtype=dtype)
    want = run(problem, "naive", torch.float64)
    assert_close(run(problem, "chunked"), want, BOUNDS[dtype])


@pytest.mark.parametrize("widths", [(40, 8), (8, 70), (130, 16)])
def test_widths_that_choose_other_chunks(widths: tuple[int, int]) -> None:
    problem = make_problem(150, batch=2, widths=widths, dtype=torch.float32)
    assert_close(run(problem, "chunked"), run(problem, "naive", torch.float64), BOUNDS[torch.float32])


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, states: bool, segments: None) -> None:
    cu_seqlens = PACKED[name]
    for dtype in (torch.float64, torch.float32):
        problem = make_problem(cu_seqlens[-1], cu_seqlens=cu_seqlens, states=states, dtype=dtype)
        assert_close(run(problem, "chunked"), run(problem, "naive", torch.float64), BOUNDS[dtype])


def test_packed_bfloat16() -> None:
    problem = make_problem(400, cu_seqlens=PACKED["odd"], dtype=torch.bfloat16)
    assert_close(run(problem, "chunked"), run(problem, "naive", torch.float64), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_batch_and_plans(tokens: int, segments: None) -> None:
    problem = make_problem(tokens, batch=3, widths=(6, 10))
    assert_close(run(problem, "chunked"), run(problem, "naive"), BOUNDS[torch.float64])


@pytest.mark.parametrize("shape", [(1, 0, 4), (2, 0, 4), (0, 5, 4), (1, 5, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    batch, tokens, heads = shape
    problem = make_problem(tokens, batch=batch, slopes=SLOPES[:heads])
    got = run(problem, "chunked")
    assert got["o"].shape[:3] == shape
    if tokens == 0:
        assert torch.equal(got["final"], problem.initial) and torch.equal(got["dinitial"], problem.dfinal)


def test_empty_document_returns_its_state_untouched() -> None:
    problem = make_problem(9, cu_seqlens=[0, 4, 4, 9, 9])
    got = run(problem, "chunked")
    for n in (1, 3):
        assert torch.equal(got["final"][n], problem.initial[n])
        assert torch.equal(got["dinitial"][n], problem.dfinal[n])


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    cu_seqlens = torch.tensor([0, 3, 4, 7])

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, initial = args
        return lightning_attention(
            q, k, v, SLOPES[:2], cu_seqlens=cu_seqlens, initial_state=initial, output_final_state=True
        )

    inputs = leaf(1, 7, 2, 2), leaf(1, 7, 2, 2), leaf(1, 7, 2, 3), leaf(3, 2, 2, 3)
    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_through_the_final_state_alone() -> None:
    results = []
    for backend in ("chunked", "naive"):
        problem = make_problem(70)
        q, k, v = (x.clone().requires_grad_() for x in problem.qkv.split(8, dim=-1))
        _, final = lightning_attention(q, k, v, problem.slopes, output_final_state=True, backend=backend)
        (final * problem.dfinal).sum().backward()
        results.append({"dk": k.grad, "dv": v.grad})
    assert_close(results[0], results[1], 1e-12)


def test_no_drift_over_a_long_row() -> None:
    tokens, width = 65536, 16
    q, k, v = torch.randn(1, tokens, 1, 3 * width, generator=torch.Generator().manual_seed(2)).split(width, dim=-1)
    for slope in (1e-6, 0.0004):
        slopes = torch.tensor([slope])
        got, state = lightning_attention(q, k, v, slopes, output_final_state=True)
        want, want_state = lightning_attention(*(x.double() for x in (q, k, v)), slopes, output_final_state=True)
        for piece in (slice(0, 4096), slice(-4096, None)):
            error = (got[:, piece] - want[:, piece]).norm() / want[:, piece].norm()
            assert error < 1e-6, (slope, piece, error)
        assert (state - want_state).norm() / want_state.norm() < 1e-6

"""The Triton kernels of lightning attention against the float64 recurrence: on CUDA where there is one, else in the
interpreter on the CPU, in small shapes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels import (
    KernelArgumentError,
    lightning_attention,
    lightning_segment_states,
    silu_lightning_attention,
)
from mmkernels.lightning.triton import choice, tiling
from tests.kernels.lightning_cases import SLOPES, assert_close, cut_rows, make_problem, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 2e-2, torch.float16: 2e-3}
PACKED = {
    "many in one chunk": [0, 1, 2, 3, 7, 7, 20, 21, 30],
    "empty at both ends": [0, 0, 0, 40, 40, 90, 90],
    "cuts on the grid": [0, 32, 64, 128, 192],
    "spans many chunks": [0, 3, 200, 201, 280],
    "one": [0, 77],
}
STEEP_AND_FLAT = SLOPES[:2]  # packed rows: all four take the interpreter twice as long


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper GPUs too, which have kernels of their own (`test_lightning_hopper.py`)."""
    monkeypatch.setattr(choice, "capability", lambda device: (0, 0))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: an element that no kernel writes shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **k: _poison(_plain(*a, **k)))
    plain_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: _poison(plain_new(*a, **k)))


def _poison(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


@pytest.fixture(params=["one segment", "many segments"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows scanned whole, and cut into many segments."""
    cut_rows(monkeypatch, into_chunks=request.param == "many segments")


def check(tokens: int, bound: float | None = None, row_state: bool = False, **options: object) -> None:
    problem = make_problem(tokens, dtype=options.pop("dtype", torch.float32), row_state=row_state, **options)
    got = run(problem, "triton", device=DEVICE, row_state=row_state)
    # The recurrence takes a token at a time; long rows are held against the chunks that were held against it.
    exact, where = ("naive", "cpu") if tokens < 1000 else ("chunked", DEVICE)
    want = run(problem, exact, torch.float64, device=where, row_state=row_state)
    assert_close(got, want, bound or BOUNDS[problem.dtype])


@pytest.mark.parametrize("tokens", [1, 2, 15, 31, 32, 33, 65, 200])
def test_lengths_and_slopes(tokens: int, segments: None) -> None:
    check(tokens)


@pytest.mark.parametrize("name", PACKED)
def test_packed_with_a_state_a_document(name: str) -> None:
    check(PACKED[name][-1], cu_seqlens=PACKED[name], slopes=STEEP_AND_FLAT)


@pytest.mark.parametrize("name", PACKED)
def test_packed_with_a_state_a_row(name: str, segments: None) -> None:
    check(PACKED[name][-1], cu_seqlens=PACKED[name], slopes=STEEP_AND_FLAT, row_state=True)


@pytest.mark.parametrize("name", PACKED)
def test_packed_without_states(name: str, segments: None) -> None:
    check(PACKED[name][-1], cu_seqlens=PACKED[name], slopes=STEEP_AND_FLAT, states=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_lower_precision(dtype: torch.dtype, segments: None) -> None:
    check(150, dtype=dtype)
    check(150, dtype=dtype, cu_seqlens=[0, 60, 61, 150], states=False)


@pytest.mark.parametrize("widths", [(40, 8), (8, 40), (24, 24)])
def test_widths(widths: tuple[int, int]) -> None:
    check(70, widths=widths, batch=2)


def test_batch_rows_are_apart(segments: None) -> None:
    check(80, batch=3)


@pytest.mark.parametrize("shape", [(1, 0, 4), (2, 0, 4), (0, 5, 4), (1, 5, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    batch, tokens, heads = shape
    q, k, v = (torch.randn(batch, tokens, heads, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    slopes = SLOPES[:heads].to(DEVICE)
    initial = torch.randn(batch, heads, 8, 8, device=DEVICE, requires_grad=True)
    o, final = lightning_attention(q, k, v, slopes, initial_state=initial, output_final_state=True, backend="triton")
    assert o.shape == q.shape and (tokens or torch.equal(final, initial))
    (o.sum() + final.sum()).backward()
    assert q.grad is not None and (tokens or torch.equal(initial.grad, torch.ones_like(initial)))


@pytest.mark.parametrize("wanted", ["o", "final"])
def test_gradient_through_one_output_alone(wanted: str) -> None:
    problem = make_problem(70, dtype=torch.float32)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [x.to(device, dtype).requires_grad_() for x in problem.qkv.split(8, dim=-1)]
        o, final = lightning_attention(*leaves, problem.slopes.to(device), output_final_state=True, backend=backend)
        (o if wanted == "o" else final).square().sum().backward()
        grads.append({n: x.grad.double().cpu() for n, x in zip(("dk", "dv"), leaves[1:], strict=True)})
    assert_close(grads[0], grads[1], 1e-5)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 31, 150]])
@pytest.mark.parametrize("backend", ["triton", "triton, recomputed", "chunked"])
def test_silu_attention_is_attention_of_silu(backend: str, cu_seqlens: list[int] | None, segments: None) -> None:
    raw = torch.randn(1, 150, 4, 3 * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    do = torch.randn(1, 150, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    results = []
    for name, dtype, device in ((backend, torch.float32, DEVICE), ("naive", torch.float64, "cpu")):
        x = raw.to(device, dtype).requires_grad_()
        cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device)
        name, _, again = name.partition(", ")
        o = silu_lightning_attention(x, SLOPES.to(device), cu_seqlens=cu, recompute=bool(again), backend=name)
        o.backward(do.to(device, dtype))
        results.append({"o": o.detach().double().cpu(), "dqkv": x.grad.double().cpu()})
    assert_close(*results, 3e-6)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 10, 100], [0, 0, 25, 50, 75, 100, 100], [0, 60, 61, 62, 100]])
def test_states_of_segments_add_up_to_the_state(backend: str, cu_seqlens: list[int] | None) -> None:
    """What segments leave, decayed and cut at documents, is the final state and the gradient of the initial one."""
    problem = make_problem(100, cu_seqlens=cu_seqlens, row_state=True, dtype=torch.float32)
    want = run(problem, "naive", torch.float64, row_state=cu_seqlens is not None)
    q, k, v = (x.to(DEVICE, torch.float32) for x in problem.qkv.split(8, dim=-1))
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    slopes, do = SLOPES.to(DEVICE), problem.do.to(DEVICE, torch.float32)
    forward, backward = (
        lightning_segment_states(*pair, slopes, segments=4, cu_seqlens=cu, reverse=reverse, backend=backend).double()
        for pair, reverse in (((k, v), False), ((q, do), True))
    )
    bounds = [b for b in cu_seqlens or [0, 100]]
    last_start = max(b for b in bounds if b < 100)
    first_end = min(b for b in bounds if b > 0)
    decay = torch.exp(-slopes.double()[:, None, None] * 25)
    final = sum(decay ** (3 - n) * forward[0, n] for n in range(4) if (n + 1) * 25 > last_start)
    dinitial = sum(decay**n * backward[0, n] for n in range(4) if n * 25 < first_end)
    far = torch.exp(-slopes.double()[:, None, None] * 100).cpu()
    if last_start == 0:  # one document: the given states pass through the whole row
        want["final"] = want["final"] - far * problem.initial.double()
        want["dinitial"] = want["dinitial"] - far * problem.dfinal.double()
    got = {"final": final.cpu()[None], "dinitial": dinitial.cpu()[None]}
    assert_close(got, {name: want[name] for name in got}, 3e-6)


def test_segments_must_divide_the_row() -> None:
    x = torch.randn(1, 10, 4, 8)
    with pytest.raises(KernelArgumentError, match="segments: got 3; allowed: a divisor of the 10 tokens"):
        lightning_segment_states(x, x, SLOPES, segments=3)


def test_a_document_changes_nothing_in_another(segments: None) -> None:
    q, k, v = torch.randn(1, 130, 4, 48, device=DEVICE).split(16, dim=-1)
    cu_seqlens = torch.tensor([0, 50, 130], device=DEVICE)
    before = lightning_attention(q, k, v, SLOPES.to(DEVICE), cu_seqlens=cu_seqlens, backend="triton")[0]
    for x in (q, k, v):
        x[:, :50] = 1e3
    after = lightning_attention(q, k, v, SLOPES.to(DEVICE), cu_seqlens=cu_seqlens, backend="triton")[0]
    assert torch.equal(before[:, 50:], after[:, 50:])


def test_offsets_that_lie_stay_inside_the_row() -> None:
    """On a GPU their values are not read beforehand: the result is undefined, but no kernel may leave its memory."""
    q, k, v = torch.randn(1, 100, 4, 48, device=DEVICE).split(16, dim=-1)
    for wrong in ([0, 700, 100], [0, -60, 100], [50, 20, 10], [5, 40]):
        cu_seqlens = torch.tensor(wrong, device=DEVICE)
        for states in (False, True):
            lightning_attention(
                q, k, v, SLOPES.to(DEVICE), cu_seqlens=cu_seqlens, output_final_state=states,
                backend="triton", check_values=False,
            )  # fmt: skip
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def test_what_triton_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(width: int = 8, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> None:
        x = torch.randn(1, 4, 4, width, dtype=dtype, device=device)
        lightning_attention(x, x, x, SLOPES.to(device), backend="triton")

    with pytest.raises(KernelArgumentError, match="q_BTHD: got head dimension 257; allowed: 1 to 256"):
        call(width=257)
    with pytest.raises(KernelArgumentError, match=r"q_BTHD: got dtype torch\.float64"):
        call(dtype=torch.float64)
    monkeypatch.setattr("mmkernels.common.triton_support.INTERPRETED", False)
    with pytest.raises(KernelArgumentError, match="q_BTHD: got device cpu; allowed: a CUDA device"):
        call(device="cpu")


def test_segments_cover_the_row_and_keep_the_chip_busy() -> None:
    for programs in (1, 2, 16, 32, 100, 128, 256, 1000):
        for tokens in (0, 1, 63, 64, 1000, 32768, 131072, 1 << 20):
            count, length = tiling.segments_for(programs, tokens, 64, 132)
            assert length % 64 == 0 and (count - 1) * length < max(tokens, 1) <= count * length
    assert tiling.segments_for(128, 32768, 64, 132)[0] == 1
    assert tiling.segments_for(32, 131072, 64, 132)[0] == 4
    assert tiling.segments_for(16, 131072, 64, 132)[0] == 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_the_promised_widths(width: int, dtype: torch.dtype, packed: bool) -> None:
    cu_seqlens = [0, 1, 64, 65, 65, 700, 1500, 1777] if packed else None
    bound = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3, torch.float32: 5e-6}[dtype]
    for tokens, states in (
        ((1777, True), (1777, False)) if packed else ((1, True), (63, True), (1777, True), (1792, False))
    ):
        check(tokens, dtype=dtype, widths=(width, width), cu_seqlens=cu_seqlens, states=states, bound=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 31, 700]])
def test_silu_in_bfloat16(cu_seqlens: list[int] | None, recompute: bool) -> None:
    """SiLU's derivative by the approximate hyperbolic tangent."""
    generator = torch.Generator().manual_seed(3)
    raw, do = (torch.randn(1, 700, 4, n, generator=generator).bfloat16().cuda() for n in (3 * 128, 128))
    cu, results = None if cu_seqlens is None else torch.tensor(cu_seqlens, device="cuda"), []
    for backend, dtype in (("triton", torch.bfloat16), ("chunked", torch.float64)):
        x = raw.to(dtype, copy=True).requires_grad_()
        o = silu_lightning_attention(x, SLOPES.cuda(), cu_seqlens=cu, recompute=recompute, backend=backend)
        o.backward(do.to(dtype))
        thirds = zip(("dq", "dk", "dv"), x.grad.double().cpu().split(128, dim=-1), strict=True)
        results.append({"o": o.detach().double().cpu(), **dict(thirds)})
    assert_close(*results, 1e-2)


@pytest.mark.gpu
def test_no_drift_over_a_million_tokens() -> None:
    tokens, width = 1 << 20, 64
    x = torch.randn(1, tokens, 2, 3 * width, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    slopes = torch.tensor([1e-6, 0.0004], device="cuda")
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        q, k, v = x.to(dtype).split(width, dim=-1)
        got, state = lightning_attention(q, k, v, slopes, output_final_state=True, backend="triton")
        want, want_state = lightning_attention(
            q.double(), k.double(), v.double(), slopes, output_final_state=True, backend="chunked"
        )
        last = (got[:, -4096:].double() - want[:, -4096:]).norm() / want[:, -4096:].norm()
        assert last < bound and (state - want_state).norm() / want_state.norm() < bound

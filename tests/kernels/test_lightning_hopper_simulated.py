"""The scan for Hopper, without one: its programs run as Python (`gluon_simulator.py`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmkernels import lightning_segment_states, silu_lightning_attention
from mmkernels.common.triton_support import INTERPRETED
from mmkernels.lightning.triton import autograd, choice
from mmkernels.lightning.triton.choice import Launch
from tests.kernels.chunk_cases import NAMES, Row, chunk_inputs, whole_row
from tests.kernels.gluon_simulator import Simulated
from tests.kernels.lightning_cases import PACKED_CHUNKS, SLOPES, assert_close, cut_rows, make_problem, run

hopper_scan = pytest.importorskip("mmkernels.lightning.hopper.scan")
hopper_states = pytest.importorskip("mmkernels.lightning.hopper.states")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a Hopper GPU runs the kernels")
BOUND = 2e-2  # the interpreter, which runs the kernels around it, cuts bfloat16 off where a GPU rounds


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> dict[Launch, Simulated]:
    """Launches on this CPU go to the simulator."""
    kernels = {
        Launch.SCAN: Simulated(hopper_scan.scan_hopper_kernel),
        Launch.SCAN_PACKED_SILU_GRAD: Simulated(hopper_scan.scan_hopper_kernel),
        Launch.DK_DV: Simulated(hopper_scan.dk_dv_hopper_kernel),
        Launch.STATES: Simulated(hopper_states.states_hopper_kernel),
    }
    monkeypatch.setattr(choice, "capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "hopper_kernels", lambda: kernels)
    monkeypatch.setitem(choice.HOPPER_TILES, Launch.STATES, choice.HopperTile(64, 3, 1))
    return kernels


@pytest.fixture(params=["one segment", pytest.param("many segments", marks=pytest.mark.slow)])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows scanned whole, and cut into many segments."""
    cut_rows(monkeypatch, into_chunks=request.param == "many segments")


def check(tokens: int, row_state: bool = False, width: int = 64, **options: object) -> None:
    options = {"slopes": SLOPES[:2], **options}
    problem = make_problem(tokens, dtype=torch.bfloat16, widths=(width, width), row_state=row_state, **options)
    got = run(problem, "triton", row_state=row_state)
    assert_close(got, run(problem, "naive", torch.float64, row_state=row_state), BOUND)


@pytest.mark.parametrize("tokens", [33, 64, 65, 128, 200])
def test_lengths(tokens: int, segments: None, simulated: dict[Launch, Simulated]) -> None:
    check(tokens)
    check(tokens, states=False)
    assert simulated[Launch.SCAN].launches == 4 and simulated[Launch.DK_DV].launches == 2


def test_two_warpgroups_for_heads_of_128(segments: None) -> None:
    check(200, width=128)
    check(270, width=128, cu_seqlens=[0, 3, 198, 270], row_state=True)


def test_slopes_and_rows_of_a_batch() -> None:
    check(100, slopes=SLOPES[2:], batch=2)


@pytest.mark.parametrize("name", PACKED_CHUNKS)
def test_packed(name: str, segments: None, simulated: dict[Launch, Simulated]) -> None:
    tokens = PACKED_CHUNKS[name][-1]
    check(tokens, cu_seqlens=PACKED_CHUNKS[name], states=False)
    check(tokens, cu_seqlens=PACKED_CHUNKS[name], row_state=True)
    assert simulated[Launch.SCAN].launches == 4 and simulated[Launch.DK_DV].launches == 2
    many = autograd.segments_for(1, tokens, 64, 1)[0] > 1
    assert simulated[Launch.STATES].launches == (4 if many else 0)


def test_documents_with_states_of_their_own() -> None:
    check(300, cu_seqlens=[0, 3, 270, 271, 300])


def test_cutting_a_row_costs_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of segments round the side that the scan rounds: the other one made dv's error 1.1 times as large."""
    problem = make_problem(1024, dtype=torch.bfloat16, widths=(64, 64), slopes=torch.tensor([0.002]), states=False)
    problem = dataclasses.replace(problem, qkv=F.silu(problem.qkv))  # as in the model: their means are not 0
    exact, errors = run(problem, "naive", torch.float64), []
    for segments in (1, 8):
        monkeypatch.setattr(autograd, "segments_for", lambda *a, n=segments: (n, 1024 // n))
        got = run(problem, "triton")
        errors.append({name: float((got[name].double() - exact[name]).norm()) for name in ("o", "dq", "dk", "dv")})
    assert all(errors[1][name] < 1.03 * errors[0][name] for name in errors[0]), errors


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 31, 150]], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_silu(
    width: int, cu_seqlens: list[int] | None, recompute: bool, segments: None, simulated: dict[Launch, Simulated]
) -> None:
    """Inside the forward scan when it is computed again for backward, whose scans multiply by its derivative."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(1, 150, 2, 3 * width, generator=generator).bfloat16()
    do = torch.randn(1, 150, 2, width, generator=generator).bfloat16()
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("naive", torch.float64)):
        x = raw.to(dtype, copy=True).requires_grad_()
        o = silu_lightning_attention(x, SLOPES[:2], cu_seqlens=cu, recompute=recompute, backend=backend)
        o.backward(do.to(dtype))
        thirds = dict(zip(("dq", "dk", "dv"), x.grad.double().split(width, dim=-1), strict=True))
        results.append({"o": o.detach().double(), **thirds})
    assert_close(*results, BOUND)
    scans = simulated[Launch.SCAN].launches + simulated[Launch.SCAN_PACKED_SILU_GRAD].launches
    assert scans == 2 and simulated[Launch.DK_DV].launches == 1


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_chunks_with_states_of_their_own(width: int, silu: bool, simulated: dict[Launch, Simulated]) -> None:
    """A rank's chunks, far apart in the row, whose length is no multiple of 64; one lies inside a document."""
    lengths, slopes = (1, 2, 75, 1, 131), torch.tensor([0.03])
    inputs = chunk_inputs(210, slopes, (width, width), torch.bfloat16)
    found = Row(lengths, [[2, 0], [1]], slopes, "triton").run(*inputs, silu=silu)
    want = whole_row(lengths, slopes, *inputs, silu=silu)
    assert_close(*({n: x.double() for n, x in zip(NAMES, xs, strict=True)} for xs in (found, want)), BOUND)
    launches = [simulated[launch].launches for launch in (Launch.SCAN, Launch.SCAN_PACKED_SILU_GRAD, Launch.DK_DV)]
    assert launches == ([2, 2, 2] if silu else [4, 0, 2]) and simulated[Launch.STATES].launches == 4


@pytest.mark.parametrize("lengths", [(3, 170, 7), (3, 30, 7)], ids=str)
def test_a_chunk_does_not_depend_on_who_has_it(lengths: tuple[int, ...], simulated: dict[Launch, Simulated]) -> None:
    """Chunks of 90 tokens go to the kernels for Hopper, chunks of 20 do not, however many a rank has."""
    slopes = torch.tensor([1e-6])
    inputs = chunk_inputs(sum(lengths), slopes, (64, 64), torch.bfloat16)
    found = [Row(lengths, table, slopes, "triton").run(*inputs) for table in ([[0, 1]], [[1], [0]])]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert (simulated[Launch.SCAN].launches > 0) == (sum(lengths) > 64)


@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_segments_of_a_packed_row(reverse: bool, simulated: dict[Launch, Simulated]) -> None:
    """Documents that cross the segments' edges, and more of them than a program looks at at a time."""
    k, v, _, _ = (x.bfloat16() for x in chunk_inputs(1300, SLOPES[:2], (64, 64)))
    cu_seqlens = torch.tensor([*range(1100), 1250, 1250, 1300])
    got, want = (
        lightning_segment_states(*pair, SLOPES[:2], segments=4, cu_seqlens=cu_seqlens, reverse=reverse, backend=backend)
        for backend, pair in (("triton", (k, v)), ("chunked", (k.double(), v.double())))
    )
    assert simulated[Launch.STATES].launches == 1
    assert (got - want).norm(dim=(3, 4)).div(want.norm(dim=(3, 4))).max() < BOUND

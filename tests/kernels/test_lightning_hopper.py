"""The scan for Hopper against float64: its compilation is tested without a GPU (`test_compiles_for_hopper.py`), its
numbers need one.
"""

from __future__ import annotations

import pytest
import torch

from mmkernels import silu_lightning_attention
from mmkernels.lightning.triton import choice
from tests.kernels.chunk_cases import NAMES, TABLES, Row, chunk_inputs, whole_row
from tests.kernels.lightning_cases import PACKED_CHUNKS, SLOPES, assert_close, cut_rows, make_problem, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
BOUND = 6e-3


@pytest.fixture(autouse=True)
def spied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch went to the kernels for Hopper."""
    taken: list[bool] = []
    plain = choice.hopper_takes

    def hopper_takes(*arguments: object) -> bool:
        taken.append(plain(*arguments))
        return taken[-1]

    monkeypatch.setattr(choice, "hopper_takes", hopper_takes)
    return taken


@pytest.fixture(params=["one segment", "many segments"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows scanned whole, and cut into many segments."""
    cut_rows(monkeypatch, into_chunks=request.param == "many segments")


def check(tokens: int, row_state: bool = False, width: int = 128, **options: object) -> None:
    problem = make_problem(tokens, dtype=torch.bfloat16, widths=(width, width), row_state=row_state, **options)
    got = run(problem, "triton", device="cuda", row_state=row_state)
    assert_close(got, run(problem, "chunked", torch.float64, device="cuda", row_state=row_state), BOUND)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [33, 64, 65, 128, 200, 1777])
def test_lengths(tokens: int, width: int, segments: None, spied: list[bool]) -> None:
    check(tokens, width=width)
    check(tokens, width=width, states=False)
    assert spied and all(spied)


def test_rows_of_a_batch_are_apart(segments: None) -> None:
    check(200, batch=3)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", PACKED_CHUNKS)
def test_packed(name: str, width: int, segments: None, spied: list[bool]) -> None:
    tokens = PACKED_CHUNKS[name][-1]
    check(tokens, width=width, cu_seqlens=PACKED_CHUNKS[name], states=False)
    check(tokens, width=width, cu_seqlens=PACKED_CHUNKS[name], row_state=True)
    assert spied and all(spied)
    check(tokens, width=width, cu_seqlens=PACKED_CHUNKS[name])


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 31, 700]], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_silu_inside(cu_seqlens: list[int] | None, recompute: bool, width: int, segments: None) -> None:
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(1, 700, 4, 3 * width, generator=generator).bfloat16().cuda()
    do = torch.randn(1, 700, 4, width, generator=generator).bfloat16().cuda()
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("chunked", torch.float64)):
        x = raw.to(dtype, copy=True).requires_grad_()
        cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device="cuda")
        o = silu_lightning_attention(x, SLOPES.cuda(), cu_seqlens=cu, recompute=recompute, backend=backend)
        o.backward(do.to(dtype))
        thirds = dict(zip(("dq", "dk", "dv"), x.grad.double().cpu().split(width, dim=-1), strict=True))
        results.append({"o": o.detach().double().cpu(), **thirds})
    assert_close(*results, 1.5 * BOUND)


def test_a_document_changes_nothing_in_another(segments: None) -> None:
    from mmkernels import lightning_attention

    q, k, v = torch.randn(1, 330, 4, 384, device="cuda", dtype=torch.bfloat16).split(128, dim=-1)
    cu_seqlens = torch.tensor([0, 150, 330], device="cuda")
    before = lightning_attention(q, k, v, SLOPES.cuda(), cu_seqlens=cu_seqlens)[0]
    for x in (q, k, v):
        x[:, :150] = 1e3
    after = lightning_attention(q, k, v, SLOPES.cuda(), cu_seqlens=cu_seqlens)[0]
    assert torch.equal(before[:, 150:], after[:, 150:])


def test_offsets_that_lie_stay_inside_the_row() -> None:
    from mmkernels import lightning_attention

    q, k, v = torch.randn(1, 500, 4, 384, device="cuda", dtype=torch.bfloat16).split(128, dim=-1)
    for wrong in ([0, 700, 100], [0, -60, 100], [50, 20, 10], [5, 40], [0, 500, 0, 500, 0, 500]):
        cu_seqlens = torch.tensor(wrong, device="cuda")
        lightning_attention(q, k, v, SLOPES.cuda(), cu_seqlens=cu_seqlens, check_values=False)
    torch.cuda.synchronize()


def test_what_it_cannot_take_goes_to_the_other_scan(spied: list[bool]) -> None:
    x = torch.randn(1, 200, 4, 3 * 128 + 1, device="cuda", dtype=torch.bfloat16)[..., 1:]
    from mmkernels import lightning_attention

    q, k, v = x.split(128, dim=-1)
    got = lightning_attention(q, k, v, SLOPES.cuda())[0]
    want = lightning_attention(q.double(), k.double(), v.double(), SLOPES.cuda(), backend="chunked")[0]
    assert not any(spied) and (got - want).norm() < BOUND * want.norm()


@pytest.mark.parametrize("table", [*TABLES.values(), [[6, 0, 3, 5, 1, 7, 2, 4]]], ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_chunks_with_states_of_their_own(width: int, silu: bool, table: list[list[int]], spied: list[bool]) -> None:
    """Chunks of 45 and 90 tokens; documents of one token, of prime length, of whole chunks, ending at an edge."""
    for lengths in ((1, 2, 61, 1, 0, 7, 66, 37, 7, 1, 97, 80), (3, 340, 17), (180, 90, 89, 1)):
        inputs = chunk_inputs(360, SLOPES, (width, width), torch.bfloat16)
        found = Row(lengths, table, SLOPES, "triton", "cuda").run(*inputs, silu=silu)
        want = whole_row(lengths, SLOPES, *inputs, silu=silu)
        results = ({n: x.double() for n, x in zip(NAMES, xs, strict=True)} for xs in (found, want))
        assert_close(*results, 2 * BOUND)
    assert spied and all(spied)


def test_a_chunk_does_not_depend_on_who_has_it() -> None:
    inputs = chunk_inputs(360, SLOPES, (128, 128), torch.bfloat16)
    found = [Row((3, 340, 17), table, SLOPES, "triton", "cuda").run(*inputs) for table in TABLES.values()]
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))

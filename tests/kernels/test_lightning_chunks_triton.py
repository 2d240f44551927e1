"""Chunks of a row through the Triton kernels, against the float64 recurrence of the whole row: on CUDA where there is
one, else in the interpreter on the CPU, in small shapes. New memory holds NaN.

Legend: N chunks of a rank, M of the row.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning import ChunkPlan, chunks_backward, chunks_forward, lightning_segment_states, states_between
from mmkernels.lightning.device.padded_chunks import pad_documents
from mmkernels.lightning.triton import choice, tiling
from mmkernels.lightning.triton import scan as launches
from tests.kernels.chunk_cases import NAMES, TABLES, Row, chunk_inputs, whole_row
from tests.kernels.lightning_cases import assert_close
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 2e-2}
SLOPES = torch.tensor([1.0, 1e-6])  # both ends of the promised range
LENGTHS = {
    "short documents": (1, 2, 61, 1, 0, 7, 66, 37, 7, 1, 97),
    "one document": (280,),
    "ends at an edge": (140, 70, 69, 1),
    "spans whole chunks": (3, 270, 7),
    "prime lengths": (131, 149),
}
EIGHT = [[6, 0, 3, 5, 1, 7, 2, 4]]


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper GPUs too, which have kernels of their own; and whatever is allocated holds NaN."""
    monkeypatch.setattr(choice, "capability", lambda device: (0, 0))
    fill_new_memory(monkeypatch)


def check(
    lengths: tuple[int, ...], table: list[list[int]], widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32, slopes: Tensor = SLOPES, silu: bool = False,
) -> None:  # fmt: skip
    inputs = chunk_inputs(sum(lengths), slopes, widths, dtype)
    found = Row(lengths, table, slopes, "triton", DEVICE).run(*inputs, silu=silu)
    want = whole_row(lengths, slopes, *inputs, silu=silu)
    assert_close(*({n: x.double() for n, x in zip(NAMES, xs, strict=True)} for xs in (found, want)), BOUNDS[dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunks_are_the_row(lengths: tuple[int, ...]) -> None:
    check(lengths, TABLES["zigzag"])


@pytest.mark.slow
@pytest.mark.parametrize("table", [TABLES["contiguous"], TABLES["alone"], EIGHT], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunks_of_other_tables_are_the_row(lengths: tuple[int, ...], table: list[list[int]]) -> None:
    check(lengths, table, slopes=torch.tensor([0.917, 0.0004]))


@pytest.mark.parametrize("table", [[[0, 1, 2]], [[0]], EIGHT], ids=["three", "one", "eight"])
def test_numbers_of_chunks(table: list[list[int]]) -> None:
    for lengths in ((1, 80, 1, 50, 12), (24,)):
        check(lengths, table, slopes=SLOPES[1:])


@pytest.mark.parametrize("width", [16, 64, 128])
def test_bfloat16(width: int) -> None:
    check((1, 2, 130, 1, 66), TABLES["zigzag"], (width, width), torch.bfloat16, torch.tensor([0.03]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_projection_before_its_silu(dtype: torch.dtype) -> None:
    check((3, 130, 67), TABLES["contiguous"], dtype=dtype, slopes=torch.tensor([0.03]), silu=True)


@pytest.mark.parametrize("widths", [(24, 24), (8, 40), (40, 8)])
def test_widths(widths: tuple[int, int]) -> None:
    check((3, 70, 7), TABLES["zigzag"], widths, slopes=SLOPES[1:], silu=widths == (8, 40))


def test_a_chunk_does_not_depend_on_who_has_it() -> None:
    """To the bit."""
    inputs = chunk_inputs(280, SLOPES[1:], (16, 16), torch.bfloat16)
    tables = (TABLES["contiguous"], [[2, 0, 3], [1]])
    found = [Row((3, 265, 12), table, SLOPES[1:], "triton", DEVICE).run(*inputs) for table in tables]
    for name, x, y in zip(NAMES, *found, strict=True):
        assert torch.equal(x, y), name


def test_documents_change_nothing_in_each_other() -> None:
    lengths, row = (100, 43, 57), Row((100, 43, 57), TABLES["zigzag"], SLOPES[1:], "triton", DEVICE)
    inputs = chunk_inputs(sum(lengths), SLOPES[1:], (16, 16), torch.float32)
    before = row.run(*inputs)
    for x in inputs:
        x[:, 100:143] = 1e3
    for name, x, y in zip(NAMES, before, row.run(*inputs), strict=True):
        assert torch.equal(x[:, :100], y[:, :100]) and torch.equal(x[:, 143:], y[:, 143:]), name


def test_one_launch_a_pass_and_dq_before_the_states_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("scan", "scan_dk_dv"):
        plain = getattr(launches, name)
        for module in ("chunks", "autograd"):
            where = f"mmkernels.lightning.triton.{module}.{name}"
            if not (module == "chunks" and name == "scan_dk_dv"):
                monkeypatch.setattr(where, lambda *a, _n=name, _f=plain, **k: (order.append(_n), _f(*a, **k))[1])
    q, k, v, do = (x.to(DEVICE) for x in chunk_inputs(100, SLOPES, (16, 16), torch.float32))
    slopes, offsets = SLOPES.to(DEVICE), torch.tensor([0, 25, 50, 75, 100], device=DEVICE)
    states = torch.zeros(4, 2, 16, 16, device=DEVICE)
    _, saved = chunks_forward(q, k, v, slopes, offsets, states, backend="triton")

    def final_gradient() -> Tensor:
        order.append("gradient")
        return states

    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    chunks_backward(q, k, v, do, slopes, offsets, states, final_gradient, saved, grads, backend="triton")
    assert order == ["scan", "scan", "gradient", "scan_dk_dv"]


@pytest.mark.parametrize("segments", [1, 3, 7])
def test_where_segments_begin_in_padded_chunks(segments: int) -> None:
    lengths = (5, 64, 1, 70, 0, 70, 65, 5, 140) * 3
    cut = sorted({*torch.tensor((0, *lengths)).cumsum(0).tolist(), *range(0, 1261, 1260 // segments)})
    found = pad_documents(torch.tensor(cut, device=DEVICE), 1260, 64, segments).segment_firsts_S1.tolist()
    length, counts = 1260 // segments, [-(-(b - a) // 64) for a, b in pairwise(cut)]
    want = [sum(n for n, a in zip(counts, cut, strict=False) if a < s * length) for s in range(segments + 1)]
    assert found == want


def test_offsets_that_lie_stay_inside_the_row() -> None:
    """On a GPU their values are not read beforehand: the result is undefined, but no kernel may leave its memory."""
    q, k, v, do = (x.to(DEVICE) for x in chunk_inputs(100, SLOPES, (16, 16), torch.float32))
    states = torch.zeros(4, 2, 16, 16, device=DEVICE)
    for wrong in ([0, 100], [0, 25, 700, 50, 75], [50, 20, 10]):
        offsets = torch.tensor(wrong, device=DEVICE)
        rest = (SLOPES.to(DEVICE), offsets, states)
        _, saved = chunks_forward(q, k, v, *rest, backend="triton", check_values=False)
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        chunks_backward(q, k, v, do, *rest, lambda: states, saved, grads, backend="triton")
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("chunk_tokens", [3, 40], ids=["states are seen far away", "and not"])
@pytest.mark.parametrize("wanted", [range(7), [5, 0, 2], [3], []], ids=str)
def test_states_between_are_those_of_torch(wanted: list[int], chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    enters = [False, True, True, True, True, False, True]
    through = [
        False,
        True,
        False,
        True,
        False,
        False,
        False,
    ]  # in chunk 2 one document ends, and one begins and goes on
    place = torch.randperm(7, generator=generator).tolist()
    states = torch.randn(7, 2, 40, 36, generator=generator)  # more numbers than a program holds
    for reverse in (False, True):
        found = []
        for backend, x, device in (("triton", states.to(DEVICE), DEVICE), ("chunked", states.double(), "cpu")):
            plan = ChunkPlan.of(chunk_tokens, through, enters, wanted, place, device)
            slopes = SLOPES.to(device)
            found.append(states_between(x, slopes, plan, reverse=reverse, backend=backend).double().cpu())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
        alone = ChunkPlan.of(chunk_tokens, through, enters, range(7), place, DEVICE)
        every = states_between(states.to(DEVICE), SLOPES.to(DEVICE), alone, reverse=reverse, backend="triton")
        assert torch.equal(found[0], every[list(wanted)].double().cpu())  # whoever wants them, to the bit


def test_what_triton_cannot_take_is_refused() -> None:
    plan = ChunkPlan.of(3, [False], [False], [0], [0], DEVICE)
    with pytest.raises(KernelArgumentError, match=r"states_MHDE: got dtype torch\.float64"):
        states_between(torch.zeros(1, 2, 8, 8, device=DEVICE).double(), SLOPES.to(DEVICE), plan, backend="triton")
    q, k, v, _ = (x.to(DEVICE) for x in chunk_inputs(4, SLOPES, (8, 8)))
    with pytest.raises(KernelArgumentError, match=r"q_BTHD: got dtype torch\.float64"):
        states = torch.zeros(1, 2, 8, 8, device=DEVICE).double()
        chunks_forward(q, k, v, SLOPES.to(DEVICE), torch.tensor([0, 4], device=DEVICE), states, backend="triton")


def test_nothing_to_do() -> None:
    x, states = torch.empty(1, 0, 2, 8, device=DEVICE), torch.zeros(3, 2, 8, 8, device=DEVICE)
    rest = (SLOPES.to(DEVICE), torch.tensor([0, 0], device=DEVICE), states)
    o, saved = chunks_forward(x, x, x, *rest, backend="triton")
    chunks_backward(x, x, x, x, *rest, lambda: states, saved, (x, x, x), backend="triton")
    assert o.shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["for Hopper", "others"])
def test_tensors_of_more_than_2_to_the_31_numbers(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last chunk of such a projection give what each gives alone, to the bit."""
    if kernels == "for Hopper":
        monkeypatch.setattr(choice, "capability", tiling.capability)
    tokens, heads, width, count = 98304, 64, 128, 8
    generator = torch.Generator(DEVICE).manual_seed(5)
    raw = torch.randn(1, tokens, heads, 3 * width, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    do = torch.randn(1, tokens, heads, width, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    before = torch.randn(count, heads, width, width, generator=generator, device=DEVICE)
    slopes, size = torch.logspace(-6, 0, heads, device=DEVICE), tokens // count
    assert raw.numel() > 2**31

    def run(part: slice, states: slice) -> list[Tensor]:
        x, dy, own = raw[:, part], do[:, part], before[states]
        act, grad = torch.nn.functional.silu(x), torch.empty_like(x)
        pieces = sorted({*range(0, x.shape[1] + 1, size), *(n + 777 for n in range(0, x.shape[1], size))})
        rest = (slopes, torch.tensor(pieces, device=DEVICE), own)
        q, k, v = act.split(width, 3)
        o, saved = chunks_forward(q, k, v, *rest, backend="triton")
        grads, raws = grad.split(width, 3), x.split(width, 3)
        chunks_backward(q, k, v, dy, *rest, lambda: own, saved, grads, raw=raws, backend="triton")
        cut = {"segments": len(own), "cu_seqlens": rest[1], "backend": "triton"}
        left = [lightning_segment_states(*pair, slopes, reverse=r, **cut) for r, pair in enumerate(((k, v), (q, dy)))]
        return [o, grad, *(x.transpose(0, 1) for x in left)]

    whole = run(slice(None), slice(None))
    for n in (0, count - 1):
        alone = run(slice(n * size, (n + 1) * size), slice(n, n + 1))
        for i, (x, y) in enumerate(zip(whole, alone, strict=True)):
            assert torch.equal(x[n : n + 1] if i > 1 else x[:, n * size : (n + 1) * size], y), (n, i)

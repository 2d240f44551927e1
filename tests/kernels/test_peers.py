"""Rows out of the memory of several ranks, here all in one process, against an all-to-all spelt out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.peers import PeerMemory, meet, take_from_peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]


def memories(ranks: int, size: int) -> list[PeerMemory]:
    """The same memory as each rank sees it."""
    parts = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(ranks)]
    return [PeerMemory(parts, rank) for rank in range(ranks)]


def fill(memory: PeerMemory, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random rows on every rank."""
    laid = [memory.rows(rank, rows, width, dtype) for rank in range(len(memory.parts))]
    for rank, x_MD in enumerate(laid):
        x_MD.copy_(torch.randn(x_MD.shape, generator=torch.Generator().manual_seed(rank)))
    return laid


def arrivals(laid: list[Tensor], rank: int) -> Tensor:
    """What an all-to-all of equal parts brings this rank."""
    return torch.cat([x_MD.chunk(len(laid))[rank] for x_MD in laid])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "rows", "width"), [(4, 20, 24), (2, 2, 8), (3, 99, 37), (1, 40, 16), (2, 70, 3000)])
def test_rows_arrive_as_from_an_all_to_all(ranks: int, rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    seen = memories(ranks, 2 * rows * width * dtype.itemsize)
    laid = fill(seen[0], rows, width, dtype)
    for rank, memory in enumerate(seen):
        generator = torch.Generator().manual_seed(rank)
        source = torch.randperm(rows, generator=generator)
        source[torch.rand(rows, generator=generator) < 0.3] = -1
        wanted = arrivals(laid, rank)
        source, keep = source.int().to(DEVICE), (source >= 0).to(DEVICE)
        for arguments, expected in (
            ({"source_M": source}, wanted[source.long().clamp(min=0)]),
            ({"used_M": source}, wanted),  # of which only the sign counts
        ):
            out = torch.full((rows, width), float("nan"), dtype=dtype, device=DEVICE)
            take_from_peers(memory, out, **arguments, backend=backend)
            assert torch.equal(out[keep], expected[keep])
            assert out[~keep].isnan().all()  # what nobody wants stays unwritten


def test_one_row_may_be_read_often() -> None:
    memory = memories(2, 4 * 8 * 4)[1]
    laid = fill(memory, 4, 8, torch.float32)
    source = torch.tensor([2, 2, 2, 2], dtype=torch.int32, device=DEVICE)
    for backend in BACKENDS:
        out = torch.full((4, 8), float("nan"), device=DEVICE)
        take_from_peers(memory, out, source_M=source, backend=backend)
        assert torch.equal(out, laid[1][2].expand(4, 8))


def test_nothing_wanted_reads_nothing() -> None:
    memory = memories(2, 64)[0]
    for rows in (0, 2):
        out = torch.full((rows, 4), float("nan"), device=DEVICE)
        for backend in BACKENDS:
            take_from_peers(
                memory, out, used_M=torch.full((rows,), -1, dtype=torch.int32, device=DEVICE), backend=backend
            )
            assert out.isnan().all()


def test_a_meeting_tells_every_rank_and_waits_for_all() -> None:
    """The last of three ranks comes, so it need not wait; the others have written their numbers before."""
    seen = memories(3, 3 * 8)
    numbers = [part.view(torch.int64) for part in seen[0].parts]
    for number in (1, 2):
        for other in (0, 1):
            numbers[2][other] = number
        meet(seen[2], number)
        assert [row.tolist() for row in numbers] == [[0, 0, number], [0, 0, number], [number] * 3]


@pytest.mark.gpu
def test_a_meeting_holds_back_who_comes_first() -> None:
    """Two streams of one GPU: what the late one writes before the meeting is there for the other after it."""
    seen, late = memories(2, 16), torch.cuda.Stream()
    value, found = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(50_000_000)
        value.fill_(7)
        meet(seen[1], 1)
    meet(seen[0], 1)
    found.copy_(value)
    torch.cuda.synchronize()
    assert found.item() == 7


INDEX = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("out_MD", {"out_MD": torch.zeros(4, 8, dtype=torch.int32), "used_M": INDEX}),
        ("out_MD", {"out_MD": torch.zeros(4), "used_M": INDEX}),
        ("out_MD", {"out_MD": torch.zeros(3, 8), "used_M": INDEX[:3]}),  # two ranks
        ("out_MD", {"out_MD": torch.zeros(8, 4).t(), "used_M": INDEX}),
        ("source_M", {"out_MD": torch.zeros(4, 8), "source_M": INDEX.long()}),
        ("used_M", {"out_MD": torch.zeros(4, 8)}),
        ("used_M", {"out_MD": torch.zeros(4, 8), "used_M": INDEX[:2]}),
        ("used_M", {"out_MD": torch.zeros(4, 8), "source_M": INDEX, "used_M": INDEX}),
        ("memory", {"out_MD": torch.zeros(4, 16), "used_M": INDEX}),  # more than was mapped
        ("backend", {"out_MD": torch.zeros(4, 8), "used_M": INDEX, "backend": "cuda"}),
    ],
)
def test_bad_arguments_are_refused_by_name(argument: str, arguments: dict[str, object]) -> None:
    memory = PeerMemory([torch.zeros(4 * 8 * 4, dtype=torch.uint8) for _ in range(2)], 0)
    with pytest.raises(KernelArgumentError) as caught:
        take_from_peers(memory, **arguments)
    assert caught.value.argument == argument


def test_a_meeting_needs_room_for_a_number_of_each_rank() -> None:
    with pytest.raises(KernelArgumentError, match="8 bytes a rank"):
        meet(PeerMemory([torch.zeros(8, dtype=torch.uint8) for _ in range(2)], 0), 1)

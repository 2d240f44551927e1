"""A copy of a GPU's tensors in host memory is that of before they changed, whatever room the GPU has."""

from __future__ import annotations

import pytest
import torch

from mmtrain.checkpoint import staging
from mmtrain.checkpoint.device_memory import free_bytes, take
from mmtrain.checkpoint.staging import StagingBuffer

pytestmark = pytest.mark.gpu
SIZES = [(1 << 24,), (1023, 4097), (3, 5), (1 << 25,)]  # the link takes longer for these than a change of them


def sources() -> list[torch.Tensor]:
    """Tensors of two dtypes, wider ones first, one not contiguous."""
    made = [torch.randn(shape, device="cuda") for shape in SIZES]
    made[1] = made[1].t()
    return [*made, torch.randn(77, device="cuda").bfloat16()]


@pytest.mark.parametrize("room", [0, 1 << 27, 1 << 40], ids=["none", "some", "all"])
def test_the_copy_is_that_of_before(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda device: min(room, free_bytes(device)))
    copy, given = StagingBuffer(torch.device("cuda", 0)), sources()
    for _ in range(3):  # the memory of the first copy serves the others
        wanted = [x.cpu() for x in given]
        copy.start(given, [i == 2 for i in range(len(given))])
        given[2].zero_()  # a buffer
        copy.wait()
        for x in given:
            x.add_(1.0)
        found = [x.clone() for x in copy.finish()]
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    copy.release()


def test_memory_comes_and_goes_outside_of_the_allocator() -> None:
    """Seen in one of a few tries at least: other processes take of the same memory, and give it back."""
    device = torch.device("cuda", 0)
    torch.cuda.synchronize()
    counted, seen = torch.cuda.max_memory_allocated(), []
    for _ in range(10):
        before = free_bytes(device)
        held = take(device, 1 << 28)
        assert held is not None and held.bytes_N.shape == (1 << 28,)
        during = free_bytes(device)
        held.free()
        seen.append((before - during, free_bytes(device) - during))
    assert any(taken >= 1 << 28 and back >= (1 << 28) - (1 << 22) for taken, back in seen), seen
    assert torch.cuda.max_memory_allocated() == counted
    assert take(device, 1 << 50) is None

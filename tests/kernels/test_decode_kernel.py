"""The decode step in Triton and in place, against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import KernelArgumentError, lightning_decode_step
from mmkernels.lightning import decode
from mmkernels.lightning.naive import naive_lightning_attention
from mmkernels.lightning.triton import decode_kernel
from tests.kernels.poison import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
# Triton's interpreter cuts bfloat16 off where the compiler rounds.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, decode, decode_kernel)


def make(batch: int, heads: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of a fused projection, slopes, state."""
    generator = torch.Generator().manual_seed(batch * 100 + d)
    q, k, v = torch.randn(batch, heads, 2 * d + e, generator=generator).to(DEVICE, dtype).split([d, d, e], dim=-1)
    slopes = torch.rand(heads, generator=generator).to(DEVICE)
    return [q, k, v, slopes, torch.randn(batch, heads, d, e, generator=generator).to(DEVICE)]


def assert_right(tensors: list[Tensor], o: Tensor, new: Tensor) -> None:
    """Against the recurrence, by norm of every row and every head's state."""
    q, k, v, slopes, state = tensors
    want, final = naive_lightning_attention(q[:, None], k[:, None], v[:, None], slopes, None, state)
    assert o.dtype == q.dtype and new.dtype == state.dtype
    for got, expected, bound in ((o, want[:, 0], BOUND[o.dtype]), (new, final, 3e-7)):
        error = (got.double() - expected).flatten(2).norm(dim=-1)
        assert (error <= bound * expected.flatten(2).norm(dim=-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "d", "e"), [(2, 3, 32, 32), (1, 2, 96, 96), (3, 1, 5, 40), (1, 1, 256, 256), (1, 5, 1, 1)]
)
def test_step(batch: int, heads: int, d: int, e: int, dtype: torch.dtype, inplace: bool, backend: str) -> None:
    tensors = make(batch, heads, d, e, dtype)
    kept = tensors[4].clone()
    o, new = lightning_decode_step(*tensors, inplace=inplace, backend=backend)
    assert (new is tensors[4]) if inplace else torch.equal(kept, tensors[4])
    assert_right([*tensors[:4], kept], o, new)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activated_first(dtype: torch.dtype, backend: str) -> None:
    q, k, v, slopes, state = make(2, 3, 12, 40, dtype)
    state = 0.1 * state  # so that the new token weighs
    o, new = lightning_decode_step(q, k, v, slopes, state, silu=True, backend=backend)
    want, final = lightning_decode_step(*(F.silu(x.double()) for x in (q, k, v)), slopes, state.double())
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for got, expected in ((o, want), (new, final)):
        assert (got.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    q, k, v, slopes, state = make(2, 3, 16, 24)
    q = q.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    k = k[:, :1].expand(2, 3, 16)
    slopes = slopes.repeat_interleave(2)[::2]
    views = [state.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([state, -state], dim=2)[:, :, 0]]
    for view in views:
        assert_right([q, k, v, slopes, state], *lightning_decode_step(q, k, v, slopes, view, backend=backend))
        o, new = lightning_decode_step(q, k, v, slopes, view, inplace=True, backend=backend)
        assert new is view
        assert_right([q, k, v, slopes, state], o, view)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_writes_nothing_beside_the_state(backend: str) -> None:
    q, k, v, slopes, state = make(2, 3, 12, 20)
    pool = torch.full((4, 3, 16, 24), 7.0, device=DEVICE)
    pool[1:3, :, 2:14, 3:23] = state
    mine = torch.zeros_like(pool, dtype=torch.bool)
    mine[1:3, :, 2:14, 3:23] = True
    lightning_decode_step(q, k, v, slopes, pool[1:3, :, 2:14, 3:23], inplace=True, backend=backend)
    assert (pool[~mine] == 7.0).all() and not (pool[mine] == 7.0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [16, 24])
def test_states_in_slots(d: int, backend: str) -> None:
    q, k, v, slopes, state = make(3, 2, d, 20)
    pool = torch.full((5, 2, d, 20), 7.0, device=DEVICE)
    pool[[4, 1]] = state[[0, 2]]
    slots = torch.tensor([4, -1, 1], device=DEVICE)
    o, new = lightning_decode_step(q, k, v, slopes, pool, inplace=True, slots_B=slots, backend=backend)
    assert new is pool and (o[1] == 0).all() and (pool[[0, 2, 3]] == 7.0).all()
    some = [0, 2]
    assert_right([q[some], k[some], v[some], slopes, state[some]], o[some], pool[slots[some]])


def test_bad_slots() -> None:
    tensors = make(2, 2, 8, 8)
    slots = torch.tensor([1, 0], device=DEVICE)
    for bad in (slots.int(), slots[:1], slots[None]):
        with pytest.raises(KernelArgumentError, match=r"^slots_B: "):
            lightning_decode_step(*tensors, inplace=True, slots_B=bad)
    with pytest.raises(KernelArgumentError, match=r"^slots_B: .*None without inplace"):
        lightning_decode_step(*tensors, slots_B=slots)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_nothing_to_do(shape: tuple[int, int, int, int], backend: str) -> None:
    o, new = lightning_decode_step(*make(*shape), backend=backend)
    assert o.shape == (*shape[:2], 8) and new.shape == shape


@pytest.mark.parametrize("slopes_dtype", [torch.float32, torch.float64], ids=str)
def test_many_steps_in_place_do_not_drift(slopes_dtype: torch.dtype) -> None:
    q, k, v, _, state = make(1, 2, 8, 8)
    slopes = torch.tensor([1e-3, 1e-5], dtype=slopes_dtype, device=DEVICE)
    want = state.double()
    for _ in range(100):
        lightning_decode_step(q, k, 0 * v, slopes, state, inplace=True, backend="triton")
        want = want * torch.exp(-slopes.double())[:, None, None]
    torch.testing.assert_close(state.double(), want, rtol=100 * 2**-23, atol=0)


def test_gradient_goes_through_torch() -> None:
    q, k, v, slopes, state = make(1, 2, 8, 8)
    leaf = state.clone().requires_grad_()
    o, _ = lightning_decode_step(q, k, v, slopes, leaf)
    o.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    with torch.no_grad():
        assert_right([q, k, v, slopes, state], *lightning_decode_step(q, k, v, slopes, leaf, backend="triton"))
    with pytest.raises(KernelArgumentError, match="when a gradient"):
        lightning_decode_step(q, k, v, slopes, leaf, backend="triton")
    with pytest.raises(KernelArgumentError, match=r"^inplace: "):
        lightning_decode_step(q, k, v, slopes, leaf, inplace=True)


def test_bad_arguments() -> None:
    tensors = make(2, 2, 8, 8)
    with pytest.raises(KernelArgumentError, match="auto, triton, torch"):
        lightning_decode_step(*tensors, backend="chunked")
    with pytest.raises(KernelArgumentError, match=r"^state_BHDE: .*inplace"):
        lightning_decode_step(*tensors[:4], tensors[4][:1].expand(2, -1, -1, -1), inplace=True)
    with pytest.raises(KernelArgumentError, match="1 to 256"):
        lightning_decode_step(*make(1, 1, 257, 8), backend="triton")
    doubles = [x.double() for x in tensors]
    lightning_decode_step(*doubles)
    with pytest.raises(KernelArgumentError, match="with backend='triton'"):
        lightning_decode_step(*doubles, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "heads", "d", "e"), [(64, 64, 128, 128), (33, 7, 96, 96), (5, 9, 256, 192)])
def test_big_shapes(batch: int, heads: int, d: int, e: int, dtype: torch.dtype, inplace: bool) -> None:
    tensors = make(batch, heads, d, e, dtype)
    kept = tensors[4].clone()
    o, new = lightning_decode_step(*tensors, inplace=inplace)
    assert_right([*tensors[:4], kept], o, new)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    q, k, v = (torch.randn(2100, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slopes, state = torch.rand(64, device="cuda"), torch.randn(2100, 64, 128, 128, device="cuda")
    tail = state[-2:].clone()
    o, new = lightning_decode_step(q, k, v, slopes, state, inplace=True)
    assert_right([q[-2:], k[-2:], v[-2:], slopes, tail], o[-2:], new[-2:])

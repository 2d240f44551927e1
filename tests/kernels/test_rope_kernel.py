"""The partial rotary embedding against float64 autograd of its definition, in both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.rope import eager, launch, partial_rope
from mmkernels.rope.naive import naive_partial_rope
from tests.kernels.poison import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter cuts bfloat16 off where the compiler rounds.
BOUND = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3,
    torch.float16: 1e-3,
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, eager, launch)


def make(tokens: int, heads: int, width: int, rotated: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, cos, sin, dout."""
    generator = torch.Generator().manual_seed(tokens * 100 + width)
    angle = torch.rand(tokens, rotated // 2, generator=generator) * 1000
    x, dout = (torch.randn(tokens, heads, width, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return [x, angle.cos().to(DEVICE), angle.sin().to(DEVICE), dout]


def run(tensors: list[Tensor], call: Any, **options: Any) -> list[Tensor]:
    x, cos, sin, dout = tensors
    x = x.detach().requires_grad_()
    out = call(x, cos, sin, **options)
    return [out.detach(), *torch.autograd.grad(out, x, dout)]


def assert_right(tensors: list[Tensor], backend: str) -> None:
    dtype = tensors[0].dtype
    got = run(tensors, partial_rope, backend=backend)
    want = run([x.double() for x in tensors], naive_partial_rope)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == dtype and value.is_contiguous()
        error = (value.double() - expected).norm(dim=-1)
        assert (error <= BOUND[dtype] * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated"),
    [(1, 1, 2, 2), (5, 8, 128, 64), (3, 3, 96, 40), (33, 1, 16, 16), (2, 40, 20, 6), (7, 4, 7, 4)],
)
def test_output_and_gradient(
    tokens: int, heads: int, width: int, rotated: int, dtype: torch.dtype, backend: str
) -> None:
    tensors = make(tokens, heads, width, rotated, dtype)
    assert_right(tensors, backend)
    out = partial_rope(*tensors[:3], backend=backend)
    assert torch.equal(out[..., rotated:], tensors[0][..., rotated:])


def test_float64_runs_in_torch() -> None:
    x, cos, sin, dout = make(5, 2, 12, 8, torch.float64)
    assert_right([x, cos, sin, dout], "auto")
    leaf = x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda leaf: partial_rope(leaf, cos, sin), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_to_do(shape: tuple[int, int, int], backend: str) -> None:
    out, dx = run(make(*shape, 4), partial_rope, backend=backend)
    assert out.shape == dx.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend: str) -> None:
    x, cos, sin, dout = make(5, 4, 24, 16, torch.bfloat16)
    fused = torch.cat([x, x, x], dim=-1)[..., 24:48]
    heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.zeros(5 * 4 * 27 + 1, dtype=x.dtype, device=DEVICE)[1:].view(5, 4, 27)[..., 2:26].copy_(x)
    cos, sin = torch.cat([cos, sin], dim=-1).split(8, dim=-1)
    for view in (fused, heads_first, shifted, x[::2], x[:, :1].expand(5, 4, 24)):
        assert_right([view, cos[: len(view)], sin[: len(view)], dout[: len(view)]], backend)
    for gradient in (dout.transpose(0, 1).contiguous().transpose(0, 1), dout[:, :, :1].expand(5, 4, 24)):
        assert_right([x, cos, sin, gradient], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_is_left_alone_and_tables_of_ones_change_nothing(backend: str) -> None:
    x, cos, _, _ = make(5, 4, 24, 16, torch.bfloat16)
    kept = x.clone()
    out = partial_rope(x, torch.ones_like(cos), torch.zeros_like(cos), backend=backend)
    assert torch.equal(out, kept) and torch.equal(x, kept)


def test_bad_arguments() -> None:
    x, cos, sin, _ = make(3, 2, 8, 4)
    bad: list[tuple[str, str, dict[str, Any]]] = [
        ("x_THK", "a tensor", {"x_THK": [1.0]}),
        ("x_THK", "3 dimensions", {"x_THK": x[0]}),
        ("x_THK", "torch.float32 or", {"x_THK": x.int()}),
        ("x_THK", "stride 1", {"x_THK": x.transpose(1, 2)}),
        ("cos_TR2", "from 1 to 4", {"cos_TR2": cos[:2]}),
        ("cos_TR2", "from 1 to 4", {"cos_TR2": torch.ones(3, 5, device=DEVICE)}),
        ("cos_TR2", "torch.float32", {"cos_TR2": cos.double()}),
        ("cos_TR2", "without gradient", {"cos_TR2": cos.clone().requires_grad_()}),
        ("sin_TR2", "that of cos", {"sin_TR2": sin[:, :1]}),
        ("sin_TR2", "the device of x_THK", {"sin_TR2": sin.to("meta")}),
        ("backend", "auto, triton, torch", {"backend": "cuda"}),
        ("x_THK", "with backend='triton'", {"x_THK": x.double(), "backend": "triton"}),
    ]
    good = {"x_THK": x, "cos_TR2": cos, "sin_TR2": sin}
    for name, allowed, change in bad:
        with pytest.raises(KernelArgumentError, match=allowed) as caught:
            partial_rope(**(good | change))
        assert str(caught.value).startswith(f"{name}: got ") and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated"), [(8192, 64, 128, 64), (8191, 8, 128, 64), (999, 12, 96, 48)]
)
def test_big_shapes(tokens: int, heads: int, width: int, rotated: int, dtype: torch.dtype) -> None:
    assert_right(make(tokens, heads, width, rotated, dtype), "triton")

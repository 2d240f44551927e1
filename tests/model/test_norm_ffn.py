"""RMSNorm and SwiGLU: the hand-written forward and backward pairs against autograd through the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtrain.model.ffn import SwiGLU, swiglu
from mmtrain.model.norm import RMSNorm, rms_norm
from tests.model.small import draw, relative


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu_formula(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 7), (4, 1), (0, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_norm_equals_formula_with_gradients(
    dtype: torch.dtype, tolerance: float, scale: float, shape: tuple[int, ...]
) -> None:
    eps = 1e-5
    x, weight = (draw(*shape, seed=1) * scale).to(dtype), draw(shape[-1], seed=2, dtype=dtype)
    upstream = draw(*shape, seed=3, dtype=dtype)
    ours, exact = [[t.detach().to(to).requires_grad_() for t in (x, weight)] for to in (dtype, torch.float64)]
    y, expected = rms_norm(*ours, eps), norm_formula(*exact, eps)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == dtype and relative(y, expected) < tolerance
    # Cancellation: for one column, or eps far below x^2, dx is the small difference of terms of size dy * w / rms.
    size = (upstream * weight / (x.square().mean(-1, keepdim=True) + eps).sqrt()).double().norm()
    assert (ours[0].grad - exact[0].grad).norm() <= tolerance * size
    assert relative(ours[1].grad, exact[1].grad) < tolerance


def test_norm_gradcheck() -> None:
    x, weight = draw(3, 2, 5, seed=1).requires_grad_(), draw(5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-2), (x, weight))


def test_norm_module_uses_its_weight_and_epsilon() -> None:
    norm, x = RMSNorm(6, eps=0.5), draw(4, 6, dtype=torch.float32)
    assert torch.equal(norm.weight, torch.ones(6))
    assert relative(norm(x), norm_formula(x, torch.ones(6), 0.5)) < 1e-6
    norm.weight.data = torch.arange(6.0)
    assert relative(norm(x), norm_formula(x, torch.arange(6.0), 0.5)) < 1e-6


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norm_of_bf16_is_computed_in_fp32(weight_dtype: torch.dtype) -> None:
    x, weight = draw(6, 4096, seed=1, dtype=torch.bfloat16), draw(4096, seed=2, dtype=weight_dtype)
    upstream = draw(6, 4096, seed=3, dtype=torch.bfloat16)
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = rms_norm(*ours, 1e-5), norm_formula(*exact, 1e-5)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == ours[0].grad.dtype == torch.bfloat16 and ours[1].grad.dtype == weight_dtype
    half_ulp = 2.0**-8  # one rounding to bf16, where a bf16 computation makes several
    assert ((y - expected).abs() <= expected.abs() * half_ulp * 1.01).all()
    assert relative(ours[0].grad, exact[0].grad) < half_ulp
    assert relative(ours[1].grad, exact[1].grad) < half_ulp


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 6), (0, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_swiglu_equals_formula_with_gradients(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    x = (draw(*shape, seed=1) * 3).to(dtype)
    upstream = draw(*shape[:-1], shape[-1] // 2, seed=2, dtype=dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = swiglu(ours), swiglu_formula(exact)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == dtype and relative(y, expected) < tolerance
    assert relative(ours.grad, exact.grad) < tolerance


def test_swiglu_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, (draw(3, 2, 6).requires_grad_(),))


def test_swiglu_of_bf16_is_close() -> None:
    x, upstream = draw(64, 32, seed=1, dtype=torch.bfloat16), draw(64, 16, seed=2, dtype=torch.bfloat16)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = swiglu(ours), swiglu_formula(exact)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == ours.grad.dtype == torch.bfloat16
    assert relative(y, expected) < 6e-3 and relative(ours.grad, exact.grad) < 1e-2


def test_feed_forward_is_w2_of_silu_w1_times_w3() -> None:
    ffn, x = SwiGLU(6, 10).double(), draw(4, 6)
    with torch.no_grad():
        for i, parameter in enumerate(ffn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    w1, w3 = ffn.w13_2FD
    expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ ffn.w2_DF.T
    assert relative(ffn(x), expected) < 1e-13

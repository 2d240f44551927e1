"""RMSNorm, alone and after the residual, and the feed-forward, against autograd through their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtrain.model.ffn import SwiGLU
from mmtrain.model.norm import RMSNorm
from tests.model.small import draw, relative


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def make_norm(weight: Tensor, eps: float) -> RMSNorm:
    """The module with this weight; its gradient is collected there."""
    norm = RMSNorm(len(weight), eps)
    norm.weight = torch.nn.Parameter(weight.clone())
    return norm


@pytest.mark.parametrize("shape", [(5, 12), (6, 7), (4, 1), (0, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_norm_equals_formula_with_gradients(
    dtype: torch.dtype, tolerance: float, scale: float, shape: tuple[int, int]
) -> None:
    eps = 1e-5
    x, weight = (draw(*shape, seed=1) * scale).to(dtype), draw(shape[-1], seed=2, dtype=dtype)
    upstream = draw(*shape, seed=3, dtype=dtype)
    norm, leaf = make_norm(weight, eps), x.clone().requires_grad_()
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = norm(leaf), norm_formula(*exact, eps)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == dtype and relative(y, expected) < tolerance
    # Cancellation: for one column, or eps far below x^2, dx is the small difference of terms of size dy * w / rms.
    size = (upstream * weight / (x.square().mean(-1, keepdim=True) + eps).sqrt()).double().norm()
    assert (leaf.grad - exact[0].grad).norm() <= tolerance * size
    assert relative(norm.weight.grad, exact[1].grad) < tolerance


@pytest.mark.parametrize("uses", [(True, False), (True, True)])
def test_residual_and_norm_equal_formula_with_gradients(uses: tuple[bool, bool]) -> None:
    residual, out, weight = draw(5, 12, seed=1), draw(5, 12, seed=2), draw(12, seed=3)
    upstream = [draw(5, 12, seed=4 + i) * used for i, used in enumerate(uses)]
    norm, leaves = make_norm(weight, 1e-5), [t.clone().requires_grad_() for t in (residual, out)]
    exact = [t.clone().requires_grad_() for t in (residual, out, weight)]
    ours = norm.after_residual(*leaves, 3.5)
    h = 3.5 * exact[0] + exact[1]
    theirs = norm_formula(h, exact[2], 1e-5), h
    for results in (ours, theirs):
        sum((y * do).sum() for y, do, used in zip(results, upstream, uses, strict=True) if used).backward()
    for mine, expected in zip(ours, theirs, strict=True):
        assert relative(mine, expected) < 1e-13
    for mine, expected in zip([*leaves, norm.weight], exact, strict=True):
        assert relative(mine.grad, expected.grad) < 1e-12


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
    norm, leaf = make_norm(weight, 1e-5), x.clone().requires_grad_()
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = norm(leaf), norm_formula(*exact, 1e-5)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == leaf.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == weight_dtype
    half_ulp = 2.0**-8  # one rounding to bf16, where a bf16 computation makes several
    assert ((y - expected).abs() <= expected.abs() * half_ulp * 1.01).all()
    assert relative(leaf.grad, exact[0].grad) < half_ulp
    assert relative(norm.weight.grad, exact[1].grad) < half_ulp


def test_feed_forward_is_w2_of_silu_w1_times_w3() -> None:
    ffn, x = SwiGLU(6, 10).double(), draw(4, 6)
    with torch.no_grad():
        for i, parameter in enumerate(ffn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    w1, w3 = ffn.w13_2FD
    expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ ffn.w2_DF.T
    assert relative(ffn(x), expected) < 1e-13

"""Partial RoPE against multiplication by complex numbers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.model.rope import apply_rope, rope_table
from tests.model.small import draw

POSITIONS = torch.tensor([0, 1, 2, 7, 511, 8191, 131_071, 999_999, 1_048_575])


def rotate(x_THK: Tensor, positions_T: Tensor, rotary_dim: int, base: float) -> Tensor:
    """x_i + j x_(i + R/2), turned by position * base^(-2i/R); the angle is formed in extended precision."""
    half = rotary_dim // 2
    exponent = -2 * np.arange(half, dtype=np.longdouble) / max(rotary_dim, 1)
    angle = positions_T.numpy().astype(np.longdouble)[:, None] * np.longdouble(base) ** exponent
    turn = torch.from_numpy((np.cos(angle) + 1j * np.sin(angle)).astype(np.complex128))[:, None]
    turned = torch.complex(x_THK[..., :half], x_THK[..., half:rotary_dim]) * turn
    return torch.cat([turned.real, turned.imag, x_THK[..., rotary_dim:]], dim=-1)


@pytest.mark.parametrize("base", [1e4, 5e6, 1e7])
@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16])
def test_equals_complex_rotation_up_to_a_million_tokens(rotary_dim: int, base: float) -> None:
    x = draw(len(POSITIONS), 3, 16)
    rotated = apply_rope(x, rope_table(POSITIONS, rotary_dim, base))
    torch.testing.assert_close(rotated, rotate(x, POSITIONS, rotary_dim, base), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_dimensions_beyond_rotary_dim_pass_through(rotary_dim: int, dtype: torch.dtype) -> None:
    x = draw(len(POSITIONS), 2, 16, dtype=dtype)
    rotated = apply_rope(x, rope_table(POSITIONS, rotary_dim, 1e4))
    assert rotated.dtype == dtype and rotated.shape == x.shape
    assert torch.equal(rotated[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(rotated[0], x[0])  # position 0
    assert rotary_dim == 0 or not torch.equal(rotated[1, :, :rotary_dim], x[1, :, :rotary_dim])


def test_tables_are_exact_to_fp32_rounding_at_a_million() -> None:
    cos, sin = rope_table(POSITIONS, 64, 1e4)
    unit = torch.zeros(len(POSITIONS), 1, 64, dtype=torch.float64)
    unit[..., :32] = 1
    exact = rotate(unit, POSITIONS, 64, 1e4)[:, 0]
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), exact[:, :32], rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), exact[:, 32:], rtol=0, atol=1e-7)


def test_low_precision_inputs_are_rotated_in_fp32() -> None:
    x = draw(len(POSITIONS), 2, 16, dtype=torch.bfloat16)
    table = rope_table(POSITIONS, 16, 1e4)
    assert torch.equal(apply_rope(x, table), apply_rope(x.float(), table).bfloat16())


@pytest.mark.parametrize("shift", [1, 1000, 1_000_000])
def test_scores_depend_on_the_distance_alone(shift: int) -> None:
    positions = torch.arange(6)
    q, k = draw(6, 2, 16, seed=1), draw(6, 2, 16, seed=2)

    def scores(start: int) -> Tensor:
        table = rope_table(positions + start, 8, 1e4)
        return torch.einsum("ihk,jhk->hij", apply_rope(q, table), apply_rope(k, table))

    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-5)
    assert (scores(0) - torch.einsum("ihk,jhk->hij", q, k)).abs().max() > 0.1


def test_gradient_is_the_rotation_back() -> None:
    x, upstream = draw(9, 2, 16, seed=3).requires_grad_(), draw(9, 2, 16, seed=4)
    (apply_rope(x, rope_table(POSITIONS, 8, 1e4)) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, rotate(upstream, -POSITIONS, 8, 1e4), rtol=0, atol=1e-6)

"""Weights that are rounded to int8: nearest, ties to even, each row or group by its own largest element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.int8_weights import columns, dequantise, empty_int8, quantise, quantise_into, rows


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_of_a_row_and_its_values() -> None:
    made = quantise(torch.tensor([[127.0, -63.5, 0.5, 1.5, 2.5, -0.5], [-25.4, 0.2, 0.05, 0.0, 25.4, 12.7]]))
    assert made.scale.tolist() == [[1.0], [pytest.approx(0.2)]]
    assert made.values[0].tolist() == [127, -64, 0, 2, 2, 0]  # ties go to the even neighbour
    assert made.values[1].tolist() == [-127, 1, 0, 0, 127, 63 if made.values[1, 5] == 63 else 64]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_error_is_at_most_half_a_step(grouped: bool) -> None:
    weight = draw(6, 2, 30, 300) * torch.logspace(-6, 6, 30)[:, None]
    made = quantise(weight, grouped)
    assert made.values.shape == weight.shape and made.scale.shape == (6, 2, 30, 3 if grouped else 1)
    step = made.scale.repeat_interleave(128 if grouped else 300, -1)[..., :300]
    assert ((dequantise(made, torch.float64) - weight.double()).abs() <= 0.5001 * step).all()
    groups = weight.split(128, -1) if grouped else [weight]
    assert torch.equal(made.scale, torch.stack([part.abs().amax(-1) for part in groups], -1) / 127)
    assert made.values.abs().amax() == 127 and made.nbytes == made.values.numel() + 4 * made.scale.numel()


@pytest.mark.parametrize("grouped", [False, True])
def test_round_trip(grouped: bool) -> None:
    """What came from int8 goes back to the same scales and values."""
    once = quantise(draw(50, 300), grouped)
    again = quantise(dequantise(once, torch.float32), grouped)
    assert torch.equal(once.values, again.values)
    torch.testing.assert_close(again.scale, once.scale, rtol=2.0**-22, atol=0)


def test_each_group_has_the_scale_of_its_own_columns() -> None:
    weight = torch.ones(2, 300)
    weight[:, 128:256], weight[1, 256:] = 2.0, 4.0
    assert (127 * quantise(weight, grouped=True).scale).tolist() == [[1, 2, 1], [1, 2, 4]]
    assert (127 * quantise(weight).scale).tolist() == [[2], [4]]


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_zeros_and_of_the_smallest_numbers(grouped: bool) -> None:
    weight = draw(4, 300)
    weight[1] = 0
    weight[2] = 1e-45  # a 127th of it is no number that fp32 has
    made = quantise(weight, grouped)
    back = dequantise(made, torch.float32)
    assert made.values[1:3].count_nonzero() == 0
    assert back[1:3].count_nonzero() == 0 and torch.isfinite(back).all() and back[3].count_nonzero() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = draw(4, 300)
    weight[2, 299] = bad
    with pytest.raises(KernelArgumentError, match="NaN or infinity"):
        quantise(weight, grouped=True)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 0)])
def test_what_is_no_float_matrix_is_refused(bad: Tensor) -> None:
    with pytest.raises(KernelArgumentError, match="weight"):
        quantise(bad)


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match=r"\[3, 4\]"):
        quantise_into(empty_int8((3, 4), False), torch.ones(4, 3))


def test_some_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(7, 9, 300)
    whole = quantise(weight, True)
    monkeypatch.setattr("mmkernels.int8_weights.int8_weight._ELEMENTS", 1500)
    parts = quantise(weight, True)
    assert torch.equal(whole.values, parts.values) and torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    weight = draw(5, 40).to(dtype)
    assert torch.equal(quantise(weight).values, quantise(weight.float()).values)


@pytest.mark.parametrize("grouped", [False, True])
def test_shards_of_rows_are_rows_of_the_whole(grouped: bool) -> None:
    weight = draw(12, 256)
    whole = quantise(weight, grouped)
    for part in (slice(0, 4), slice(4, 12)):
        ours, theirs = quantise(weight[part], grouped), rows(whole, part)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.scale, theirs.scale)


def test_shards_of_columns() -> None:
    weight = draw(12, 384)
    weight[:, 300] = 9.0
    shards = [weight[:, :128], weight[:, 128:]]
    grouped = quantise(weight, grouped=True)
    for shard, part in zip(shards, (slice(0, 128), slice(128, 384)), strict=True):  # groups are whole: nothing differs
        ours, theirs = quantise(shard, grouped=True), columns(grouped, part)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.scale, theirs.scale)
    whole = quantise(weight)
    assert not torch.equal(quantise(shards[0]).scale, whole.scale)  # of its own columns alone
    absmax = [shard.abs().amax(1, keepdim=True) for shard in shards]
    for shard, part in zip(shards, (slice(0, 128), slice(128, 384)), strict=True):
        ours = quantise(shard, reduce=lambda mine: torch.maximum(mine, torch.stack(absmax).amax(0)))
        theirs = columns(whole, part)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("part", [slice(64, 256), slice(0, 200), slice(1, 384)])
def test_parts_that_cut_a_group_are_refused(part: slice) -> None:
    with pytest.raises(KernelArgumentError, match="128"):
        columns(quantise(draw(4, 384), grouped=True), part)
    assert columns(quantise(draw(4, 384)), part).scale.shape == (4, 1)

"""The eyes in the ways in which training computes: in bfloat16, and with sums of gradients beside the weights."""

from __future__ import annotations

import torch

from tests.model.small import draw, relative
from tests.vision.small import draw_images, small_vl_model


def test_bfloat16_is_near_and_stays_bfloat16() -> None:
    exact, rounded = small_vl_model().encoder, small_vl_model().encoder.bfloat16()
    images = draw_images(exact.config, (56, 28), (1, 1))
    expected, found = exact(images), rounded(images)
    assert found.dtype == torch.bfloat16 and relative(found, expected) < 3e-2
    weight = draw(*expected.shape, seed=1)
    (expected * weight).sum().backward()
    (found * weight.bfloat16()).sum().backward()
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert b.grad.dtype == torch.bfloat16
        assert (a.grad - b.grad).norm() < 6e-2 * a.grad.norm() + 1e-1, name


def test_products_add_to_the_sums_of_gradients_of_many_micro_batches() -> None:
    plain, summed = small_vl_model().encoder, small_vl_model().encoder
    totals = {name: torch.zeros_like(parameter) for name, parameter in summed.named_parameters()}
    for name, parameter in summed.named_parameters():
        parameter.gradient_sum = parameter.grad = totals[name]  # as mmtrain.parallel.compute_weights does
    for seed in range(2):
        images = draw_images(plain.config, (56, 28), (1, 1), seed=seed)
        for encoder in (plain, summed):
            encoder(images).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert (totals[name] - parameter.grad).norm() < 1e-10 * parameter.grad.norm() + 1e-10, name

"""Sampling: frequencies that follow the temperature, and continuations that follow the seed alone."""

from __future__ import annotations

import pytest
import torch

from mmtrain.infer.generate import Sampling, choose, generate
from tests.model.small import small_model


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator, count = torch.Generator().manual_seed(0), 4000
    drawn = torch.tensor([choose(logits, Sampling(temperature), generator) for _ in range(count)])
    expected = (logits.double() / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=3).double() / count
    assert (found - expected).abs().max() < 0.03  # four standard deviations


def test_a_continuation_follows_its_seed() -> None:
    model = small_model(num_layers=2, layer_pattern="LS").eval()
    prompt = torch.arange(5)
    one, again, other = (list(generate(model, prompt, 12, Sampling(1.0), eod_id=None, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other

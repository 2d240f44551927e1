"""Choice of the next token: frequencies, top-k and top-p, ties, extremes, and rules that make no sense."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmtrain.errors import ConfigError
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.draw import draw_tokens


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One row alone."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    return int(draw_tokens(logits_V[None], [sampling], [uniform]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator, count = torch.Generator().manual_seed(0), 4000
    drawn = torch.tensor([choose(logits, Sampling(temperature), generator) for _ in range(count)])
    expected = (logits.double() / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=3).double() / count
    assert (found - expected).abs().max() < 0.03  # four standard deviations


def test_sampling_keeps_to_top_k_and_top_p_and_to_its_seed() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])

    def draws(sampling: Sampling, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, sampling, generator) for _ in range(300)]

    assert set(draws(Sampling(0.0))) == {1}
    assert set(draws(Sampling(1.0))) == {0, 1, 2, 3}
    assert set(draws(Sampling(1.0, top_k=2))) == {1, 2}
    assert set(draws(Sampling(1.0, top_p=0.6))) == {1}  # the likeliest alone has 0.64
    assert set(draws(Sampling(1.0, top_p=0.7))) == {1, 2}
    assert draws(Sampling(1.0)) == draws(Sampling(1.0)) != draws(Sampling(1.0), seed=1)
    frequency = draws(Sampling(1.0)).count(1) / 300
    assert frequency == pytest.approx(logits.softmax(0)[1].item(), abs=0.1)


def test_ties_keep_to_the_number_and_extremes_stay_sane() -> None:
    def draws(logits: list[float], sampling: Sampling) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {choose(torch.tensor(logits), sampling, generator) for _ in range(300)}

    equal = [1.0] * 5
    assert draws(equal, Sampling(1.0, top_k=2)) == {0, 1}  # exactly k, the lower ids
    assert draws(equal, Sampling(1.0, top_k=9)) == draws(equal, Sampling(1.0, top_p=1.0)) == {0, 1, 2, 3, 4}
    assert draws(equal, Sampling(1.0, top_p=0.5)) == {0, 1, 2}  # the third reaches a half
    assert draws(equal, Sampling(1.0, top_k=4, top_p=0.5)) == {0, 1}  # of what top-k left
    assert draws(equal, Sampling(1.0, top_p=1e-300)) == {0}
    assert draws([0.0, 1e4, -1e4], Sampling(1e-320)) == {1}
    assert draws([0.0, 3e38, 3e38], Sampling(1e-320)) == {1, 2}
    assert draws([0.0, -torch.inf, 1.0], Sampling(1e6)) == {0, 2}
    assert draws([1.0, 2.0, 2.0], Sampling(5.0, top_k=1)) == draws([1.0, 2.0, 2.0], Sampling()) == {1}


WRONG = {"temperature": (-1.0, math.nan, math.inf), "top_k": (0,), "top_p": (0.0, 1.5, math.nan)}


@pytest.mark.parametrize("wrong", [{name: value} for name, values in WRONG.items() for value in values])
def test_senseless_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong).validate()

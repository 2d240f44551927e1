"""Decoding with caches gives the logits of the full forward; sampling does what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.generate import Prefix, choose, decode, generate, read_prefix
from mmtrain.infer.sampling import Sampling
from mmtrain.model.init import build_model
from mmtrain.model.mixers.cache import DecodeCache
from mmtrain.model.packed_seq import Packing

PATTERNS = {"hybrid": "LLLS", "softmax": "S", "lightning": "L"}


def small_model(pattern: str) -> nn.Module:
    config = ModelConfig("small", vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
                         ffn_hidden_size=24, layer_pattern=pattern, rotary_dim=4, num_experts=4)  # fmt: skip
    return build_model(config).eval()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pieces", [[300], [1] * 40, [7, 1, 260, 1, 31], [128, 128]])
def test_cached_pieces_give_the_logits_of_the_full_forward(pattern: str, pieces: list[int]) -> None:
    model = small_model(PATTERNS[pattern])
    tokens = torch.randint(0, 97, (sum(pieces),), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(tokens, Packing.from_lengths([len(tokens)]))
        cache = DecodeCache.empty(model.config)
        cached = torch.cat([decode(model, part, cache) for part in tokens.split(pieces)])
    assert cache.length == len(tokens)
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=2e-5)


def test_greedy_takes_the_likeliest_token_of_the_full_forward_each_time() -> None:
    model = small_model("LLLS")
    prompt = torch.tensor([5, 9, 2])
    made = list(generate(model, prompt, 12, Sampling(), eod_id=None))
    sequence = prompt.tolist()
    for token in made:
        with torch.no_grad():
            logits = model(torch.tensor(sequence), Packing.from_lengths([len(sequence)]))
        assert token == int(logits[-1].argmax())
        sequence.append(token)
    assert list(generate(model, prompt, 12, Sampling(), eod_id=made[4])) == made[: made.index(made[4])]


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


def test_a_prefix_that_is_read_once_serves_every_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtrain.infer.generate._PIECE", 16)
    model = small_model("LS")
    prompt = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(4))  # three pieces
    prefix = read_prefix(model, prompt)
    for seed in range(2):
        made = generate(model, prefix.copy(), 4, Sampling(1.5), eod_id=None, seed=seed)
        assert list(made) == list(generate(model, prompt, 4, Sampling(1.5), eod_id=None, seed=seed))
    assert prefix.cache.length == 40
    with torch.no_grad():
        full = model(prompt, Packing.from_lengths([40]))[-1]
    torch.testing.assert_close(prefix.logits_V, full, rtol=1e-4, atol=2e-5)


def test_tokens_that_are_never_chosen_stay_out() -> None:
    model = small_model("S")
    never = torch.arange(97) != 13
    start = Prefix(DecodeCache.empty(model.config), torch.zeros(97))
    for sampling in (Sampling(), Sampling(3.0), Sampling(3.0, top_k=5, top_p=0.9)):
        assert list(generate(model, start.copy(), 3, sampling, eod_id=None, never=never)) == [13] * 3


WRONG = {"temperature": (-1.0, math.nan, math.inf), "top_k": (0,), "top_p": (0.0, 1.5, math.nan)}


@pytest.mark.parametrize("wrong", [{name: value} for name, values in WRONG.items() for value in values])
def test_senseless_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong).validate()

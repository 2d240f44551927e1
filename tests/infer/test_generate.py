"""Decoding with caches gives the logits of the full forward; sampling does what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.generate import Sampling, choose, decode, generate
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


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_senseless_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong).validate()

"""Token-by-token continuation with the recurrent state of lightning layers and the key/value cache of softmax layers.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.model.mixers.cache import DecodeCache
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        top_p: sample among the likeliest whose probabilities first sum to this; None among all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def validate(self) -> None:
        """Refuse values that cannot be sampled with.

        Raises:
            ConfigError: a value out of range.
        """
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "must not be negative", "0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top-k", self.top_k, "must be at least 1", "leave it out to sample among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top-p", self.top_p, "must lie in (0, 1]", "leave it out to sample among all tokens")


@torch.no_grad()
def generate(
    model: HybridLM, prompt_T: Tensor, max_tokens: int, sampling: Sampling, *, eod_id: int | None, seed: int = 0
) -> Iterator[int]:
    """Yield the ids that continue the prompt, until `eod_id` (not yielded) or `max_tokens`.

    Args:
        model: in evaluation mode, whole, on one device.
        prompt_T: int64 [T], at least one token, on the model's device.
    """
    generator = torch.Generator(device=prompt_T.device).manual_seed(seed)
    cache = DecodeCache.empty(model.config)
    logits_V = decode(model, prompt_T, cache)[-1]
    for _ in range(max_tokens):
        token = choose(logits_V, sampling, generator)
        if token == eod_id:
            return
        yield token
        logits_V = decode(model, prompt_T.new_tensor([token]), cache)[-1]


@torch.no_grad()
def decode(model: HybridLM, tokens_T: Tensor, cache: DecodeCache) -> Tensor:
    """Read tokens that continue the cached document, and return their logits [T, V]."""
    packing = Packing.from_lengths([tokens_T.shape[0]], tokens_T.device, start=cache.length)
    return model(tokens_T, packing, cache=cache)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token by its logits [V]; returns its id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    prob_V = logits_V.softmax(-1)
    if sampling.top_p is not None:
        sorted_V, order_V = prob_V.sort(descending=True)
        before_V = sorted_V.cumsum(0) - sorted_V  # the token that reaches top_p is kept
        prob_V[order_V[before_V >= sampling.top_p]] = 0.0
    return int(torch.multinomial(prob_V, 1, generator=generator))


def continue_prompt(
    model: HybridLM, tokenizer: Tokenizer, prompt: str, max_tokens: int, sampling: Sampling, seed: int = 0
) -> str:
    """Return text that continues `prompt`.

    Raises:
        ConfigError: the prompt has no token.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("prompt", repr(prompt), "has no token", "give at least one character")
    prompt_T = torch.tensor(ids, device=model.embed_tokens.weight.device)
    return tokenizer.decode(list(generate(model, prompt_T, max_tokens, sampling, eod_id=tokenizer.eod_id, seed=seed)))

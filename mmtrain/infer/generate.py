"""Token-by-token continuation with the recurrent state of lightning layers and the key/value cache of softmax layers.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.memory import is_out_of_memory
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.draw import draw_tokens
from mmtrain.model.mixers.cache import DecodeCache
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

_PIECE = 512  # tokens of a prompt read at once: bounds the memory of logits [T, V] and of attention scores


@dataclass(frozen=True)
class Prefix:
    """Prompt that a model has read, once for all continuations.

    Attributes:
        cache: what the model remembers of it.
        logits_V: of the token after it.
    """

    cache: DecodeCache
    logits_V: Tensor

    def copy(self) -> Prefix:
        """Return one that can be continued while this one stays as it is."""
        return Prefix(copy.deepcopy(self.cache), self.logits_V)


@torch.no_grad()
def read_prefix(model: HybridLM, prompt_T: Tensor) -> Prefix:
    """Read a prompt, in pieces.

    Args:
        model: in evaluation mode, whole, on one device.
        prompt_T: int64 [T], at least one token, on the model's device.

    Raises:
        ConfigError: it does not fit into the device's memory, or the logits are not finite numbers.
    """
    cache = DecodeCache.empty(model.config)
    try:
        for piece_T in prompt_T.split(_PIECE):
            logits_V = decode(model, piece_T, cache)[-1].clone()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError("--prompt", f"{len(prompt_T):,} tokens", f"does not fit into the memory of {prompt_T.device}",
                          "give a shorter one, or another --device") from None  # fmt: skip
    return Prefix(cache, _finite(logits_V))


@torch.no_grad()
def generate(
    model: HybridLM,
    prefix: Prefix | Tensor,
    max_tokens: int,
    sampling: Sampling,
    *,
    eod_id: int | None,
    seed: int = 0,
    never: Tensor | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt, until `eod_id` (not yielded) or `max_tokens`.

    Args:
        model: in evaluation mode, whole, on one device.
        prefix: the prompt as :func:`read_prefix` returns it, whose cache goes on with the continuation; or its tokens,
            int64 [T], at least one, on the model's device.
        max_tokens: ids to yield at most.
        sampling: how each is chosen.
        eod_id: ends the continuation; None goes on.
        seed: of the sampling, the same on every device.
        never: bool [V] on the CPU, ids that are not chosen, whatever their logits.

    Raises:
        ConfigError: the logits are not finite numbers, or the tokens do not fit into the device's memory; repetition is
            to be penalised, which the engine does.
    """
    if sampling.repetition_penalty != 1:
        raise ConfigError("--repetition-penalty", sampling.repetition_penalty, "needs the engine", "use Engine")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(prefix, Tensor):
        prefix = read_prefix(model, prefix)
    cache, logits_V = prefix.cache, prefix.logits_V
    device = model.embed_tokens.weight.device
    for number in range(1, max_tokens + 1):
        token = choose(_allowed(logits_V, never), sampling, generator)
        if token == eod_id:
            return
        yield token
        if number < max_tokens:
            logits_V = decode(model, torch.tensor([token], device=device), cache)[-1]


@torch.no_grad()
def decode(model: HybridLM, tokens_T: Tensor, cache: DecodeCache) -> Tensor:
    """Read tokens that continue the cached document, and return their logits [T, V]."""
    packing = Packing.from_lengths([tokens_T.shape[0]], tokens_T.device, start=cache.length)
    return model(tokens_T, packing, cache=cache)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token by its logits [V], of which one at least is finite; returns its id.

    Of equal logits the lower ids come first, so that `top_k` keeps exactly k.

    Args:
        logits_V: any floating dtype, on the generator's device.
        sampling: the rule.
        generator: random numbers.
    """
    uniform = torch.rand((), dtype=torch.float64, generator=generator).item()
    return int(draw_tokens(logits_V[None], [sampling], [uniform]))


def never_chosen(model: HybridLM, tokenizer: Tokenizer, ignore_eod: bool) -> Tensor:
    """Return the ids that must not be chosen, bool [V]: those that the tokenizer does not have and, if asked, EOD."""
    never = torch.arange(model.config.vocab_size) >= tokenizer.vocab_size
    never[tokenizer.eod_id] |= ignore_eod
    return never


def _allowed(logits_V: Tensor, never: Tensor | None) -> Tensor:
    """Return logits on the CPU, fp32 or wider, with -inf for ids that are never chosen."""
    logits_V = _finite(logits_V.cpu())
    return logits_V if never is None else logits_V.masked_fill(never, -torch.inf)


def _finite(logits_V: Tensor) -> Tensor:
    if not torch.isfinite(logits_V).all():
        raise ConfigError("checkpoint", "its weights", "give logits that are not finite numbers: its run diverged",
                          "take an earlier checkpoint")  # fmt: skip
    return logits_V

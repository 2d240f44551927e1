"""What is asked of the engine, and what it gives back. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mmtrain.errors import ConfigError
from mmtrain.infer.request import SEEDS
from mmtrain.infer.sampling import Sampling

if TYPE_CHECKING:
    from mmtrain.vision.prompt_images import PromptImages

TopTokens = list[tuple[int, float]]  # ids and their log-probabilities, likeliest first


class RequestRefused(ConfigError):
    """Request that the engine can never serve: which size or value it has, what is allowed, and the way out."""


@dataclass(frozen=True)
class GenerationRequest:
    """Continuation that is wanted of one prompt.

    Attributes:
        tokens: ids of the prompt, one at least.
        max_tokens: tokens to add at most; 0 with `prompt_logprobs` alone.
        sampling: how each is chosen.
        seed: of the sampling. What it gives does not depend on which other requests are at work.
        stop: texts that end the continuation; neither they nor what follows is part of its text.
        stop_ids: ids that end it likewise, beside the end of a document; they are not part of its tokens.
        ignore_eod: never choose the end of a document.
        logprobs: give the log-probability of each token added, by the model itself: before temperature and the like.
        prompt_logprobs: give those of the prompt's tokens, from place `score_from` on.
        score_from: 1 at least, as the first token follows nothing. What lies before need not be read if it is known.
        keep_prefix: lengths of the prompt's beginnings that the prefix cache is to keep, beside its interval's.
        top_logprobs: with each log-probability, give the likeliest tokens of that place too, so many.
        images: of the prompt, whose tokens are placeholders there; None: text alone.
        stream_text: make text as tokens come; else it is made once, at the end, which takes the host less, and news
            have none before. With stop texts it is made as tokens come all the same.
    """

    tokens: tuple[int, ...]
    max_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eod: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    score_from: int = 1
    keep_prefix: tuple[int, ...] = ()
    top_logprobs: int = 0
    images: PromptImages | None = None
    stream_text: bool = True

    @cached_property
    def takes_largest(self) -> bool:
        """Whether each token is the largest logit as the model gives it, and nothing else is asked of it."""
        return self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1 and not self.logprobs

    def validate(self, vocab_size: int) -> None:
        """Refuse what no engine of a model with so many tokens could serve.

        Raises:
            RequestRefused: the first thing that is wrong with the request itself.
            ConfigError: a value of the sampling out of range.
        """
        self.sampling.validate()
        if not self.tokens:
            _refuse("tokens", "()", "the prompt has no token", "give one at least")
        for name in ("tokens", "stop_ids"):
            wrong = next((token for token in getattr(self, name) if not 0 <= token < vocab_size), None)
            if wrong is not None:
                _refuse(name, wrong, f"is no id of this model, whose ids are 0 to {vocab_size - 1}", "encode again")
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.prompt_logprobs):
            _refuse("max_tokens", self.max_tokens, "must be at least 1", "0 only with prompt_logprobs")
        if not 0 <= self.seed < SEEDS:
            _refuse("seed", self.seed, "must lie in [0, 2^63)", "for example 0")
        if "" in self.stop:
            _refuse("stop", "''", "is found everywhere", "give text")
        if self.score_from < 1:
            _refuse("score_from", self.score_from, "must be at least 1", "the first token follows nothing")
        if not 0 <= self.top_logprobs <= vocab_size:
            _refuse("top_logprobs", self.top_logprobs, f"must lie in 0 to {vocab_size}", "for example 1")
        for length in self.keep_prefix:
            if not 0 < length <= len(self.tokens):
                _refuse("keep_prefix", length, f"is no beginning of {len(self.tokens)} tokens", "from 1 to all of them")


def _refuse(name: str, value: Any, problem: str, fix: str) -> None:
    raise RequestRefused(f"request.{name}", value, problem, fix)


class Finish(Enum):
    """Why a continuation ended."""

    EOD = "end of document"
    STOP = "stop text or id"
    LENGTH = "max_tokens"
    CANCELLED = "cancelled"


@dataclass
class Generation:
    """Continuation of one prompt.

    Attributes:
        tokens: ids added, without an id that ended it; those of a stop text are among them.
        text: of those up to a stop text; empty where the engine has no tokenizer.
        finish: why it ended.
        logprobs: natural logarithms, one a token of `tokens`, if asked for.
        prompt_logprobs: one a token of the prompt from `score_from` on, if asked for.
        prompt_likeliest: of the same tokens, whether each is the one that greedy decoding would take.
        prefix_tokens: tokens of the prompt that came from the prefix cache.
        end: the id that ended it, and its log-probability if asked for; None where none did.
        top_logprobs: with `top_logprobs`, one a token of `tokens` and one more of `end`, where an id did: the likeliest
            ids with their log-probabilities, likeliest first.
        prompt_top_logprobs: likewise, one a token of `prompt_logprobs`.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish = Finish.CANCELLED
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_likeliest: list[bool] = field(default_factory=list)
    prefix_tokens: int = 0
    end: tuple[int, float | None] | None = None
    top_logprobs: list[TopTokens] = field(default_factory=list)
    prompt_top_logprobs: list[TopTokens] = field(default_factory=list)


class Progress(NamedTuple):
    """News of one request after a step.

    Attributes:
        id: of the request.
        token: the one that was added; None if it ended the continuation instead, or none was wanted.
        text: text that is certain now.
        generation: all of it, once it has ended.
    """

    id: int
    token: int | None
    text: str
    generation: Generation | None

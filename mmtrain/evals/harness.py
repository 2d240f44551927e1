"""A model of ours as EleutherAI's lm-evaluation-harness drives one (package `lm_eval`, imported when it is asked for).

The harness brings tasks, prompts and metrics, and asks for log-probabilities and continuations: what `Answerer` gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.files.choices import encode_pair

MAX_GENERATED = 256  # the harness's default


class HarnessCalls:
    """The three calls of the harness; each takes its requests, whose `args` say what is asked.

    Args:
        answerer: the model.
        tokenizer: the one it was trained with.
        max_length: tokens of a request with its answer; longer ones are refused. None is without limit.
    """

    def __init__(self, answerer: Answerer, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        super().__init__()
        self._answerer, self._tokenizer, self._max_length = answerer, tokenizer, max_length

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation in nats, and whether it is the greedy one.

        Requests with one context that follow each other are scored together, as those of a question do.

        Raises:
            ConfigError: a request is too long, or has an empty continuation.
        """
        found: list[tuple[float, bool]] = []
        for context, continuations in _by_context([request.args for request in requests]):
            pairs = [encode_pair(self._tokenizer, context, continuation) for continuation in continuations]
            for before, after in pairs:
                self._check(len(before) + len(after))
                if not after:
                    raise ConfigError("continuation", repr(context[-40:]), "nothing follows it", "mend the task")
            rows = [np.array([*before, *after], dtype=np.int64) for before, after in pairs]
            logs = [row[-len(after) :] for row, (_, after) in zip(self._answerer.score(rows), pairs, strict=True)]
            greedy = self._greedy(pairs, logs)
            found += [(float(one.sum(dtype=np.float64)), same) for one, same in zip(logs, greedy, strict=True)]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-probability of each whole text in nats, read in one row after the end of another document.

        Raises:
            ConfigError: a text is too long.
        """
        found = []
        for request in requests:
            row = np.array([self._tokenizer.eod_id, *self._tokenizer.encode(request.args[0])], dtype=np.int64)
            self._check(len(row))
            found.append(float(self._answerer.score([row])[0].sum(dtype=np.float64)) if len(row) > 1 else 0.0)
        return found

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return the greedy continuation of each context, up to the first of its stop texts.

        Raises:
            ConfigError: a request is too long, or asks for sampling.
        """
        found = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) != 0:
                raise ConfigError("do_sample", "true", "continuations are greedy here", "give do_sample: false")
            most = int(options.get("max_gen_toks", MAX_GENERATED))
            ids = self._tokenizer.encode(context) or [self._tokenizer.eod_id]
            self._check(len(ids) + most)
            (made,) = self._answerer.generate([np.array(ids, dtype=np.int64)], most)
            until = options.get("until") or []
            found.append(_cut(self._tokenizer.decode(made), [until] if isinstance(until, str) else until))
        return found

    def _check(self, tokens: int) -> None:
        if self._max_length is not None and tokens > self._max_length:
            raise ConfigError("max_length", self._max_length, f"a request has {tokens:,} tokens, and none is cut",
                              "give more, or leave its task out")  # fmt: skip

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]], logs: Sequence[np.ndarray]) -> list[bool]:
        """Whether each continuation is what would be generated: sure where all its tokens have more than half."""
        sure = [bool(row.min() > math.log(0.5) + 1e-4) for row in logs]
        longest: dict[tuple[int, ...], int] = {}
        for (before, after), known in zip(pairs, sure, strict=True):
            if not known:
                longest[tuple(before)] = max(longest.get(tuple(before), 0), len(after))
        made = {ids: self._answerer.generate([np.array(ids, dtype=np.int64)], most)[0] for ids, most in longest.items()}
        return [known or made[tuple(before)][: len(after)] == after
                for (before, after), known in zip(pairs, sure, strict=True)]  # fmt: skip


def harness_lm(answerer: Answerer, tokenizer: Tokenizer, max_length: int | None = None) -> Any:
    """Return a model that `lm_eval.simple_evaluate(model=..., tasks=...)` takes.

    Args:
        answerer: the model.
        tokenizer: the one it was trained with.
        max_length: tokens of a request with its answer; longer ones are refused. None is without limit.

    Raises:
        ConfigError: `lm_eval` is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ConfigError("lm_eval", "missing", "the lm-evaluation-harness is not installed",
                          "pip install lm_eval") from None  # fmt: skip
    return type("HarnessLM", (HarnessCalls, LM), {})(answerer, tokenizer, max_length)


def _by_context(asked: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Contexts, each with the continuations of requests that follow each other."""
    group: list[str] = []
    for i, (context, continuation) in enumerate(asked):
        group.append(continuation)
        if i + 1 == len(asked) or asked[i + 1][0] != context:
            yield context, group
            group = []


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first place where one of the stop texts begins."""
    places = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

"""A model of ours as EleutherAI's lm-evaluation-harness drives one (package `lm_eval`, imported when it is asked for).

The harness brings tasks, prompts and metrics, and asks for log-probabilities and continuations: what `Answerer` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.files.choices import encode_pair

MAX_GENERATED = 256  # the harness's default
AT_ONCE = 64  # requests handed over together; how many of them are at work at once is for the model to say


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

        Requests are scored together, so that those with one context, as a question's are, read it once.

        Raises:
            ConfigError: a request is too long, or has an empty continuation.
        """
        pairs = [encode_pair(self._tokenizer, *request.args) for request in requests]
        for (before, after), request in zip(pairs, requests, strict=True):
            self._check(len(before) + len(after))
            if not after:
                raise ConfigError("continuation", repr(request.args[0][-40:]), "nothing follows it", "mend the task")
        rows = [np.array([*before, *after], dtype=np.int64) for before, after in pairs]
        found = [one for part in _parts(rows) for one in self._answerer.score(
            [rows[place] for place in part], [len(pairs[place][0]) for place in part])]  # fmt: skip
        return [(float(one.log_probs_N.sum(dtype=np.float64)), bool(one.likeliest_N.all())) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-probability of each whole text in nats, read in one row after the end of another document.

        Raises:
            ConfigError: a text is too long.
        """
        found: list[float] = []
        for request in requests:
            row = np.array([self._tokenizer.eod_id, *self._tokenizer.encode(request.args[0])], dtype=np.int64)
            self._check(len(row))
            scores = self._answerer.score([row], [1]) if len(row) > 1 else []
            found.append(sum(float(one.log_probs_N.sum(dtype=np.float64)) for one in scores))
        return found

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return the greedy continuation of each context, up to the first of its stop texts.

        Raises:
            ConfigError: a request is too long, or asks for sampling.
        """
        prompts, most, stops = [], [], []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) != 0:
                raise ConfigError("do_sample", "true", "continuations are greedy here", "give do_sample: false")
            ids = self._tokenizer.encode(context) or [self._tokenizer.eod_id]
            most.append(int(options.get("max_gen_toks", MAX_GENERATED)))
            self._check(len(ids) + most[-1])
            prompts.append(np.array(ids, dtype=np.int64))
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else until)
        made = [ids for part in _parts(prompts) for ids in self._answerer.generate(
            [prompts[place] for place in part], [most[place] for place in part])]  # fmt: skip
        return [_cut(self._tokenizer.decode(ids), until) for ids, until in zip(made, stops, strict=True)]

    def _check(self, tokens: int) -> None:
        if self._max_length is not None and tokens > self._max_length:
            raise ConfigError("max_length", self._max_length, f"a request has {tokens:,} tokens, and none is cut",
                              "give more, or leave its task out")  # fmt: skip


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


def _parts(rows: Sequence[np.ndarray]) -> Iterator[range]:
    """Places of rows that are handed over together: up to `AT_ONCE`."""
    for first in range(0, len(rows), AT_ONCE):
        yield range(first, min(first + AT_ONCE, len(rows)))


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first place where one of the stop texts begins."""
    places = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

"""Answers of the inference engine to offline evaluations: continuations and scores of many samples at once.

It is what `mmtrain.evals.answering.Answerer` asks for. A row that is scored is read in pieces, as a prompt is: a pass
over a whole row, as in training, would hold every layer's activations of all its tokens at once.

Legend: N tokens of a row that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.load import load_for_decoding
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.runner import StepOutOfMemory
from mmtrain.vision.prompt_images import PromptImages

AT_ONCE = 8
"""Samples at work at once, unless told otherwise."""
_NEVER = 1 << 62  # most samples share no beginning, which is no news
_SHARED = 256  # tokens that prompts must begin with alike to be read once for all: a few are cheaper read than kept
_ROUNDED = 64  # their number is a multiple of it, so that the next prompts, alike up to a few tokens, know them too


class RowScore(NamedTuple):
    """Scores of tokens that are given, each after all those before it.

    Attributes:
        log_probs_N: in nats, float32.
        likeliest_N: bool, whether a token is the one that greedy decoding would take.
    """

    log_probs_N: np.ndarray
    likeliest_N: np.ndarray


class EngineAnswerer:
    """Answers with an engine that has nothing else to do.

    Args:
        engine: of the model and its tokenizer; :func:`options_for` plans one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def check(self, longest: int) -> None:
        """Refuse an evaluation whose longest sample does not fit into the memory that was planned.

        Args:
            longest: tokens of it with its answer.

        Raises:
            ConfigError: it does not.
        """
        fits = self._engine.plan.longest
        if fits is not None and longest > fits:
            problem = f"the longest sample; {fits:,} fit into the memory of {self._engine.memory.device}"
            raise ConfigError("--lengths", f"{longest:,} tokens", problem, "give shorter ones, --precision bf16, more "
                              "--memory-gib, or a device with more")  # fmt: skip

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        max_tokens: Sequence[int],
        images: Sequence[PromptImages | None] | None = None,
    ) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, without an end-of-document token.

        What all of them begin with, such as a book, is read once, and kept for those that come next. Of prompts with
        images it is not looked for.

        Raises:
            ConfigError: a prompt does not fit into memory, or the logits are not finite numbers.
        """
        tokens = [tuple(prompt.tolist()) for prompt in prompts]
        shown = images or [None] * len(tokens)
        requests = [GenerationRequest(*one, images=seen)
                    for *one, seen in zip(tokens, max_tokens, shown, strict=True)]  # fmt: skip
        shared = _shared(prompts) // _ROUNDED * _ROUNDED if len(prompts) > 1 and not images else 0
        try:
            if shared >= _SHARED:
                beginning = tokens[0][: shared + 1]  # one token more, as a request that is known whole reads its last
                self._engine.generate([_reading(beginning, shared)])
            return [made.tokens for made in self._engine.generate(requests)]
        except StepOutOfMemory as error:
            raise _in_words(error, prompts) from None

    def score(
        self,
        rows: Sequence[np.ndarray],
        starts: Sequence[int],
        images: Sequence[PromptImages | None] | None = None,
    ) -> list[RowScore]:
        """Score each row from its start on.

        Raises:
            ConfigError: a row does not fit into memory, or the logits are not finite numbers.
        """
        try:
            found = self._engine.read_all([row.tolist() for row in rows], starts, images)
        except StepOutOfMemory as error:
            raise _in_words(error, rows) from None
        scores = [
            RowScore(np.array(made.prompt_logprobs, np.float32), np.array(made.prompt_likeliest, bool))
            for made in found
        ]
        if not all(np.isfinite(score.log_probs_N).all() for score in scores):
            raise ConfigError("checkpoint", "its weights", "give logits that are not finite numbers: its run diverged",
                              "take an earlier checkpoint")  # fmt: skip
        return scores


def options_for(longest: int | None, at_once: int = AT_ONCE) -> EngineOptions:
    """Return the sizes of an engine for an evaluation.

    The prefix cache keeps what samples are known to share and nothing else: a context for each that is at work, and a
    beginning of all.

    Args:
        longest: tokens of the longest sample with its answer; None where it is not known.
        at_once: samples at work at once.
    """
    return EngineOptions(max_running=at_once, prefix_slots=at_once + 1, prefix_interval=None, longest=longest,
                         warn_after=_NEVER)  # fmt: skip


def open_answerer(path: Path | str, device: str | None = None) -> tuple[EngineAnswerer, Tokenizer]:
    """Read the newest checkpoint at or below a path, and return what answers for it, and its tokenizer.

    Args:
        path: a run folder, one of its checkpoints, or a Hugging Face folder.
        device: as :func:`~mmtrain.infer.device.choose_device` takes it.

    Raises:
        ConfigError: as :func:`~mmtrain.infer.load.load_for_decoding` raises it.
    """
    model, tokenizer = load_for_decoding(Path(path), device=device)
    return EngineAnswerer(Engine(model, tokenizer, options_for(None))), tokenizer


def _reading(beginning: tuple[int, ...], kept: int) -> GenerationRequest:
    """Request that reads a beginning and keeps all of it but the last token; it adds and scores nothing."""
    return GenerationRequest(beginning, 0, prompt_logprobs=True, score_from=len(beginning), keep_prefix=(kept,))


def _shared(rows: Sequence[np.ndarray]) -> int:
    """Number of tokens with which all rows begin; the last token of a row is never among them."""
    least = min(map(len, rows)) - 1
    table = np.stack([row[:least] for row in rows])
    differs = (table != table[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else least


def _in_words(error: StepOutOfMemory, rows: Sequence[np.ndarray]) -> ConfigError:
    problem = f"{error.problem}, with samples of {max(map(len, rows)):,} tokens at work"
    return ConfigError("--prefill-tokens", error.value, problem, "give less, less --max-running, or less --memory-gib")

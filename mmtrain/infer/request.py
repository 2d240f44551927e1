"""Request of a command line: everything that is wanted of a model, checked before anything is read or loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.errors import ConfigError
from mmtrain.infer.sampling import Sampling

SEEDS = 1 << 63  # seeds that torch's generators take


@dataclass(frozen=True)
class Request:
    """Continuations that are wanted of one prompt.

    Attributes:
        prompt: text; an empty one stands for the start of a document.
        max_tokens: tokens to add at most.
        sampling: how each is chosen.
        samples: continuations.
        seed: of the first one; those after it count up from there.
        ignore_eod: never choose the end-of-document token, so each continuation has `max_tokens`.
        echo: write the prompt before each continuation.
        stop: texts that end a continuation, and are not written.
    """

    prompt: str
    max_tokens: int
    sampling: Sampling
    samples: int = 1
    seed: int = 0
    ignore_eod: bool = False
    echo: bool = True
    stop: tuple[str, ...] = ()

    def validate(self) -> None:
        """Refuse counts that make no sense.

        Raises:
            ConfigError: the first that does not.
        """
        self.sampling.validate()
        if self.max_tokens < 1:
            raise ConfigError("--tokens", self.max_tokens, "must be at least 1", "for example 64")
        if self.samples < 1:
            raise ConfigError("--samples", self.samples, "must be at least 1", "leave it out for one")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ConfigError("--samples", self.samples, "greedy decoding makes the same text each time",
                              "leave it out, or sample with a --temperature above 0")  # fmt: skip
        if not 0 <= self.seed <= SEEDS - self.samples:
            raise ConfigError("--seed", self.seed, "must lie in [0, 2^63)", "for example 0")
        if "" in self.stop:
            raise ConfigError("--stop", "''", "is found everywhere", "give text")


def check_rope_base(rope_base: float) -> None:
    """Refuse what cannot be a RoPE base.

    Raises:
        ConfigError: not a finite number above 1.
    """
    if not 1 < rope_base < math.inf:
        raise ConfigError("--rope-base", rope_base, "must be above 1", "leave it out, or give for example 10000")


def checked_text(text: str, option: str = "--prompt") -> str:
    """Return a text of the command line or a terminal; bytes that are not UTF-8 come to Python as lone surrogates.

    Raises:
        ConfigError: it has such bytes, so that nothing could be made of it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        fix = "give it in UTF-8" + (", or in a file with --prompt-file" if option == "--prompt" else "")
        raise ConfigError(option, repr(text)[:60], f"is not UTF-8 text (at character {error.start:,})", fix) from None
    return text

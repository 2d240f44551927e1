"""Rule by which the next token is chosen, and the values that a user gets without asking. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.errors import ConfigError

# For text, unless told otherwise: close to what the model believes, without its long tail of unlikely tokens.
TEMPERATURE, TOP_P = 0.8, 0.95


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        top_p: sample among the likeliest whose probabilities first sum to this; None among all. With `top_k`, among
            the k that are left.
        repetition_penalty: above 1 makes tokens that came before, in the prompt too, less likely; 1 does not.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    @staticmethod
    def from_options(
        greedy: bool,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """Make the rule of a command line; None stands for an option that was not given.

        Raises:
            ConfigError: a value out of range, or one that greedy decoding would not use.
        """
        if greedy:
            given = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
            for option, value in given.items():
                if value is not None:
                    raise ConfigError(option, value, "has no effect with --greedy", "keep one of the two")
        penalty = 1.0 if repetition_penalty is None else repetition_penalty
        if greedy:
            made = Sampling(repetition_penalty=penalty)
        else:
            temperature = TEMPERATURE if temperature is None else temperature
            made = Sampling(temperature, top_k, TOP_P if top_p is None else top_p, penalty)
        made.validate()
        return made

    def validate(self) -> None:
        """Refuse values that cannot be sampled with.

        Raises:
            ConfigError: a value out of range, or not a number.
        """
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("--temperature", self.temperature, "must be a number of at least 0", "0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("--top-k", self.top_k, "must be at least 1", "leave it out to sample among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("--top-p", self.top_p, "must lie in (0, 1]", "1 samples among all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError("--repetition-penalty", self.repetition_penalty, "must be a number above 0",
                              "1 penalises nothing, 1.2 does a little")  # fmt: skip

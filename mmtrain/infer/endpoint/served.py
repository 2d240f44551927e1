"""What is served and within which bounds. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.endpoint.chat_template import ChatTemplate


@dataclass(frozen=True)
class Bounds:
    """Limits of the endpoint.

    Attributes:
        body_bytes: of a request's body.
        waiting: continuations that may wait beside those at work; more are told to come again.
        length: tokens of a continuation with its prompt at most; None leaves it to the engine's memory.
        grace: seconds that requests have to finish once the server is told to stop.
    """

    body_bytes: int = 32 << 20
    waiting: int = 1024
    length: int | None = None
    grace: float = 30.0

    def validate(self) -> None:
        """Refuse bounds that make no sense.

        Raises:
            ConfigError: the first that does not.
        """
        if self.body_bytes < 1024:
            raise ConfigError("--max-body-mib", self.body_bytes / (1 << 20), "must be 1 KiB at least", "leave it out")
        if self.waiting < 0:
            raise ConfigError("--max-queue", self.waiting, "must be at least 0", "leave it out")
        if self.length is not None and self.length < 2:
            raise ConfigError("--max-length", self.length, "must be at least 2", "leave it out")
        if not 0 <= self.grace <= 86_400:
            raise ConfigError("--grace", self.grace, "must lie in 0 to 86,400 seconds", "for example 30")


@dataclass(frozen=True)
class Served:
    """A model as its clients see it.

    Attributes:
        name: what they call it.
        tokenizer: the one it was trained with.
        length: tokens of the longest continuation with its prompt.
        choices: continuations that one request may ask for.
        created: Unix time in seconds.
        chat: how messages become a prompt; None where the tokenizer does not say.
    """

    name: str
    tokenizer: Tokenizer
    length: int
    choices: int
    created: int
    chat: ChatTemplate | None = None

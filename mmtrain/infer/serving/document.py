"""One request inside the engine, as a document that grows: what it holds and what it has made."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from mmtrain.infer.serving.generation import Generation, GenerationRequest
from mmtrain.infer.serving.stop import StopText


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(eq=False)
class Document:
    """A document that grows.

    Attributes:
        id: of the request.
        request: what is asked.
        tokens: the prompt and what was added.
        text: makes text of what was added; None without a tokenizer.
        made: the result so far.
        generator: random numbers of its own.
        computed: tokens that have gone through the model, whose states and keys are in its slot and pages.
        slot: its slot while it runs.
        pages: its pages, in order.
        seen_V: bool, ids of `tokens`, where repetition is penalised.
        status: where it stands.
        reason: why it waits; empty while it does not.
    """

    id: int
    request: GenerationRequest
    tokens: list[int]
    text: StopText | None
    made: Generation = field(default_factory=Generation)
    generator: torch.Generator = field(default_factory=torch.Generator)
    computed: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    seen_V: Tensor | None = None
    status: Status = Status.WAITING
    reason: str = ""

    @property
    def remaining(self) -> int:
        """Tokens that must go through the model before the next one is known."""
        return len(self.tokens) - self.computed

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def most(self) -> int:
        """Tokens that it can come to."""
        return self.prompt_length + self.request.max_tokens

    @property
    def unscored(self) -> range:
        """Places of prompt tokens whose successor's log-probability is wanted and not known yet."""
        first = len(self.made.prompt_logprobs) if self.request.prompt_logprobs else self.prompt_length
        return range(first, self.prompt_length - 1)

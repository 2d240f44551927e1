"""One request inside the engine, as a document that grows: what it holds and what it has made."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from mmtrain.infer.serving.document_images import DocumentImages
from mmtrain.infer.serving.generation import Finish, Generation, GenerationRequest, TopTokens
from mmtrain.infer.serving.stop import StopText, WholeText
from mmtrain.vision.prompt_images import PromptImages


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
        generator: random numbers of its own; None before the first.
        computed: tokens that have gone through the model, whose states and keys are in its slot and pages.
        slot: its slot while it runs.
        pages: its pages, in order.
        seen_V: bool, ids of `tokens`, where repetition is penalised.
        status: where it stands.
        reason: why it waits; empty while it does not.
        images: those of the prompt, looked at; None: text alone.
    """

    id: int
    request: GenerationRequest
    tokens: list[int]
    text: StopText | WholeText | None
    made: Generation = field(default_factory=Generation)
    generator: torch.Generator | None = None
    computed: int = 0
    slot: int | None = None
    pages: array[int] = field(default_factory=lambda: array("q"))
    seen_V: Tensor | None = None
    status: Status = Status.WAITING
    reason: str = ""
    images: DocumentImages | None = None

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
        if not self.request.prompt_logprobs:
            return range(self.prompt_length, self.prompt_length)
        return range(self.request.score_from - 1 + len(self.made.prompt_logprobs), self.prompt_length - 1)

    @property
    def prompt_images(self) -> PromptImages | None:
        """What tells the images of its prompt from others."""
        return None if self.images is None else self.images.images

    def next_uniform(self) -> float:
        """Return the next of its random numbers, from [0, 1); greedy documents have none and get 0."""
        if self.request.sampling.temperature == 0:
            return 0.0
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.request.seed)
        return torch.rand((), dtype=torch.float64, generator=self.generator).item()

    def add(
        self, token: int, logprob: float | None, eod_id: int | None, top: TopTokens | None = None
    ) -> tuple[bool, str, Finish | None]:
        """Take the token that was chosen to follow.

        Args:
            token: its id.
            logprob: its log-probability, if the request wants it.
            eod_id: id of the end of a document.
            top: the likeliest tokens in its place, if the request wants them.

        Returns:
            Whether it belongs to the continuation, the text that is certain now, and why the continuation ends here;
            None if it does not.
        """
        request, made = self.request, self.made
        if request.max_tokens == 0:
            return False, "", Finish.LENGTH
        if top is not None and request.logprobs and request.top_logprobs:
            made.top_logprobs.append(top[: request.top_logprobs])
        if token == eod_id or token in request.stop_ids:
            made.end = (token, logprob if request.logprobs else None)
            return False, self._last_text(), self._stopped_or(Finish.EOD if token == eod_id else Finish.STOP)
        self.tokens.append(token)
        made.tokens.append(token)
        if logprob is not None and request.logprobs:
            made.logprobs.append(logprob)
        full = len(made.tokens) == request.max_tokens
        finish = Finish.LENGTH if full else None
        if self.text is None:
            return True, "", finish
        text = self.text.push(token)
        made.text += text
        if full:
            text += self._last_text()
        return True, text, self._stopped_or(finish)

    def break_off(self) -> None:
        """Give what was made the text that it has so far: the continuation ends before its end."""
        if self.text is not None:
            self.made.text += self.text.broken_off()

    def _last_text(self) -> str:
        rest = "" if self.text is None else self.text.finish()
        self.made.text += rest
        return rest

    def _stopped_or(self, finish: Finish | None) -> Finish | None:
        return Finish.STOP if self.text is not None and self.text.stopped else finish

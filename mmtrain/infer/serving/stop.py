"""Text of a continuation: as it comes, up to the first of its stop texts, or once at its end."""

from __future__ import annotations

from collections.abc import Sequence

from mmdata.tokenizer import Tokenizer
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.text_stream import TextStream, text_behind


def text_of(tokenizer: Tokenizer, request: GenerationRequest) -> StopText | WholeText:
    """Return what makes the text of a request's continuation."""
    if request.stop or request.stream_text:
        return StopText(tokenizer, request.tokens, request.stop)
    return WholeText(tokenizer, request.tokens)


class StopText:
    """Decoder that ends at a stop text and hands out nothing that could be the beginning of one.

    Attributes:
        stopped: whether a stop text has come.

    Args:
        tokenizer: of the model.
        context: ids of the prompt.
        stops: texts, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer, context)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; it may be empty."""
        return self._certain(self._stream.push(token))

    def broken_off(self) -> str:
        """Return what was not handed out and yet is certain, of a continuation that ends too early: nothing."""
        return ""

    def finish(self) -> str:
        """Return what still waits, up to a stop text; nothing after one."""
        if self.stopped:
            return ""
        certain = self._certain(self._stream.finish())
        rest, self._held = self._held, ""
        return certain if self.stopped else certain + rest

    def _certain(self, new: str) -> str:
        self._held += new
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        certain = len(self._held) - self._begun()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _begun(self) -> int:
        """Characters at the end of the text that begin a stop text, the most of any."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0


class WholeText:
    """Text that is made at the end, of all tokens: as long as nobody reads it before, that takes the least time.

    Attributes:
        stopped: never: there are no stop texts.

    Args:
        tokenizer: of the model.
        context: ids of the prompt.
    """

    stopped = False

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """Take a token; the text comes later."""
        self._ids.append(token)
        return ""

    def broken_off(self) -> str:
        """Return the text so far, without bytes that make no character yet."""
        return self.finish().rstrip("\ufffd")

    def finish(self) -> str:
        """Return the text."""
        return text_behind(self._tokenizer, self._context, self._ids)

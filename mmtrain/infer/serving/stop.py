"""Text of a continuation up to the first of its stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from mmdata.tokenizer import Tokenizer
from mmtrain.infer.text_stream import TextStream


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

"""Text of tokens that arrive one by one: only whole characters come out, and none is ever taken back."""

from __future__ import annotations

from collections.abc import Sequence

from mmdata.tokenizer import Tokenizer

_CONTEXT = 8  # tokens kept before new ones: some tokenizers treat the first token of a text in another way
_WINDOW = 32  # tokens decoded at once at most, unless a run of broken characters is longer


class TextStream:
    """Decoder of one continuation.

    A token may hold part of a character only. Text that ends in U+FFFD, which stands for bytes that make no character
    yet, waits for the next token, or for the end.

    Args:
        tokenizer: of the model.
        context: ids that come before, whose text has been written.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = list(context[-_CONTEXT:])
        self._written = len(self._decode(self._ids))  # characters of the ids' text that are out

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; it may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = self._rest(text)
        if len(self._ids) > _WINDOW:
            self._forget(text)
        return new

    def finish(self) -> str:
        """Return what still waits: broken characters, as U+FFFD."""
        return self._rest(self._decode(self._ids))

    def _rest(self, text: str) -> str:
        new, self._written = text[self._written :], max(self._written, len(text))
        return new

    def _forget(self, text: str) -> None:
        """Drop the oldest ids where the others decode to the same characters without them."""
        for first in range(len(self._ids) - _CONTEXT, 0, -1):
            kept = self._decode(self._ids[first:])
            if kept and text.endswith(kept):
                self._ids, self._written = self._ids[first:], len(kept)
                return


def text_behind(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of ids that follow others: what a :class:`TextStream` gives of them, in less time.

    Where bytes make no character, some tokenizers take those beside them for broken too, which a stream has handed out
    by then: such ids go through a stream.
    """
    before = list(context[-_CONTEXT:])
    text = tokenizer.decode([*before, *ids])
    if "\ufffd" not in text:
        return text[len(tokenizer.decode(before)) :]
    stream = TextStream(tokenizer, context)
    return "".join(map(stream.push, ids)) + stream.finish()

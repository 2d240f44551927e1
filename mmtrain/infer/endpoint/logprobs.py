"""Log-probabilities of a choice in the form of OpenAI's completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmdata.tokenizer import Tokenizer
from mmtrain.infer.serving.generation import Generation, TopTokens
from mmtrain.infer.text_stream import TextStream


def completion_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], made: Generation, echo: bool, offset: int
) -> dict[str, Any]:
    """Return the lists of a choice, of one length: a token each, of the prompt too with `echo`.

    The id that ended the continuation comes last, with no text: readers that take the tokens of a prompt by counting
    from both ends (the lm-evaluation-harness does) find one more behind them whatever was chosen. The tokens' texts
    joined are the text; of tokens that share a character the last has it.

    Args:
        tokenizer: of the model.
        prompt: its ids.
        made: the continuation, with its log-probabilities, and the prompt's if `echo`.
        echo: whether the prompt's come first; nothing is known of its first.
        offset: characters of the text before the first token.
    """
    stream = TextStream(tokenizer, () if echo else prompt)
    ids = list(prompt) if echo else []
    logprobs: list[float | None] = [None, *made.prompt_logprobs] if echo else []
    top: list[TopTokens | None] = [None, *made.prompt_top_logprobs] if echo and made.prompt_top_logprobs else []
    pieces = _pieces(stream, ids)
    if echo and made.tokens:
        stream = TextStream(tokenizer, prompt)
    pieces += _pieces(stream, made.tokens)
    ids, logprobs, top = ids + made.tokens, logprobs + made.logprobs, [*top, *made.top_logprobs]
    if made.end is not None:
        ids, logprobs, pieces = [*ids, made.end[0]], [*logprobs, made.end[1]], [*pieces, ""]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    named = None
    if top:
        named = [None if likeliest is None else _named(tokenizer, likeliest, (token, logprob))
                 for likeliest, token, logprob in zip(top, ids, logprobs, strict=True)]  # fmt: skip
    return {
        "tokens": pieces,
        "token_ids": ids,
        "token_logprobs": logprobs,
        "top_logprobs": named,
        "text_offset": offsets,
    }


def _pieces(stream: TextStream, ids: Iterable[int]) -> list[str]:
    pieces = [stream.push(token) for token in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces


def _named(tokenizer: Tokenizer, likeliest: TopTokens, chosen: tuple[int, float | None]) -> dict[str, float]:
    """The likeliest tokens, and the chosen one, by their text; of several with one text the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in (*likeliest, chosen):
        if logprob is not None:
            found.setdefault(_name(tokenizer, token), logprob)
    return found


def _name(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token])
    return f"token_id:{token}" if not text or "\ufffd" in text else text

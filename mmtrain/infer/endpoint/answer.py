"""Answers as OpenAI's clients read them: whole, and in pieces as they come."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from mmtrain.infer.endpoint.body import Asked
from mmtrain.infer.endpoint.logprobs import completion_logprobs
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.endpoint.served import Served
from mmtrain.infer.endpoint.ticket import Ticket
from mmtrain.infer.serving.generation import Finish, Generation

_FINISH = {Finish.EOD: "stop", Finish.STOP: "stop", Finish.LENGTH: "length"}


class Answer:
    """The frame of an answer, with the choices to come.

    Args:
        asked: by the client.
        served: the model.
        created: Unix time in seconds.
    """

    def __init__(self, asked: Asked, served: Served, created: int) -> None:
        self._asked, self._tokenizer = asked, served.tokenizer
        kind, prefix = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        self._kind = f"{kind}.chunk" if asked.chat and asked.stream else kind
        self._frame = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": created, "model": served.name}

    def whole(self, made: Sequence[Generation]) -> dict[str, Any]:
        """Return the answer, from what each choice made."""
        choices = [self._choice(index, one) for index, one in enumerate(made)]
        return self._object(choices, usage=self._usage(made))

    async def stream(self, ticket: Ticket) -> AsyncGenerator[bytes]:
        """Yield server-sent events until all choices have ended, and `[DONE]`; an error ends it without that word."""
        asked, made = self._asked, {}
        try:
            for index in range(len(asked.requests)):
                if asked.chat:
                    yield _event(self._object([self._part(index, None, role="assistant")]))
                elif asked.echo:
                    yield _event(self._object([self._part(index, self._prompt(index))]))
            async for index, news in ticket.news():
                if news.generation is not None:
                    made[index] = news.generation
                    yield _event(self._object([self._part(index, news.text, _FINISH[news.generation.finish])]))
                elif news.text:
                    yield _event(self._object([self._part(index, news.text)]))
        except Refusal as refusal:
            yield _event(refusal.body())
            return
        if asked.usage:
            yield _event(self._object([], usage=self._usage([made[index] for index in sorted(made)])))
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, made: Generation) -> dict[str, Any]:
        finish = _FINISH[made.finish]
        if self._asked.chat:
            message = {"role": "assistant", "content": made.text}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
        logprobs, prompt = None, self._prompt(index) if self._asked.echo else ""
        if self._asked.logprobs is not None:
            ids = self._asked.requests[index].tokens
            logprobs = completion_logprobs(self._tokenizer, ids, made, self._asked.echo, 0)
        return {"index": index, "text": prompt + made.text, "logprobs": logprobs, "finish_reason": finish}

    def _part(self, index: int, text: str | None, finish: str | None = None, role: str | None = None) -> dict[str, Any]:
        if not self._asked.chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        delta = {"role": role, "content": ""} if role else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _prompt(self, index: int) -> str:
        text = self._asked.texts[index]
        return self._tokenizer.decode(list(self._asked.requests[index].tokens)) if text is None else text

    def _object(self, choices: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        return {**self._frame, "object": self._kind, "choices": choices, **rest}

    def _usage(self, made: Sequence[Generation]) -> dict[str, Any]:
        """Counts of tokens; a prompt with several choices counts once."""
        firsts = range(0, len(made), self._asked.n)
        prompt = sum(len(self._asked.requests[index].tokens) for index in firsts)
        added = sum(len(one.tokens) for one in made)
        cached = sum(made[index].prefix_tokens for index in firsts)
        return {"prompt_tokens": prompt, "completion_tokens": added, "total_tokens": prompt + added,
                "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"

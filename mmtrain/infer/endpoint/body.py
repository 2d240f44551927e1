"""Bodies of requests, made into what the engine is asked for."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from mmdata.errors import DataError
from mmtrain.infer.endpoint.fields import Fields, checked_ids, checked_text, is_list_of_ids
from mmtrain.infer.endpoint.refusal import Refusal, wrong
from mmtrain.infer.endpoint.served import Served
from mmtrain.infer.request import SEEDS
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.generation import GenerationRequest

MAX_TOKENS, MAX_CHAT_TOKENS = 16, 256  # where a body does not say; the former is OpenAI's
MAX_LOGPROBS = 20
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

# Fields whose effect is not here, with the value that has none.
_NOT_HERE: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "min_p": 0}
_NOT_IN_CHATS: dict[str, Any] = {"logprobs": False, "top_logprobs": 0, "tools": [], "functions": [],
                                 "tool_choice": "none", "modalities": ["text"],
                                 "response_format": {"type": "text"}}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        requests: of the engine, one a choice, in the order of their indices: `n` of the first prompt, then the next.
        texts: of each choice's prompt, as it was given; None where ids were.
        chat: whether the answer is a message.
        echo: whether the text of the prompt is part of a choice's.
        logprobs: the likeliest tokens to tell beside each; None tells no log-probabilities.
        stream: whether text is sent as it comes.
        usage: whether a stream ends with the counts of tokens.
        n: choices of one prompt.
    """

    requests: tuple[GenerationRequest, ...]
    texts: tuple[str | None, ...]
    chat: bool
    echo: bool
    logprobs: int | None
    stream: bool
    usage: bool
    n: int


def completion(fields: Fields, served: Served) -> Asked:
    """Read the body of a completion.

    Raises:
        Refusal: the first field that is wrong, or the size.
    """
    _check_model(fields, served)
    prompts = [_prompt(one, served) for one in _prompts(fields.take("prompt"))]
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    most = fields.integer("max_tokens", MAX_TOKENS, 0)
    if most == 0 and not (echo and logprobs is not None):
        raise wrong("max_tokens", 0, "must be at least 1; 0 only with echo and logprobs")
    stream, usage = _stream(fields)
    if stream and logprobs is not None:
        raise wrong("logprobs", logprobs, "is not sent with stream; leave one of the two out")
    fields.only("suffix", "")
    common = _common(fields, served, len(prompts))
    best_of = fields.integer("best_of", common.n, 1)
    if best_of != common.n:
        raise wrong("best_of", best_of, f"must be n, {common.n}: no others are made")
    fields.finish()
    for _, ids in prompts:
        _check_length(served, len(ids), most, "prompt", "max_tokens")
    scored = echo and logprobs is not None
    requests = [
        common.request(ids, most, choice, stream, logprobs, scored) for _, ids in prompts for choice in range(common.n)
    ]
    texts = [text for text, _ in prompts for _ in range(common.n)]
    return Asked(tuple(requests), tuple(texts), False, echo, logprobs, stream, usage, common.n)


def chat(fields: Fields, served: Served) -> Asked:
    """Read the body of a chat completion.

    Raises:
        Refusal: the tokenizer has no chat template, a field is wrong, or the size.
    """
    if served.chat is None:
        raise Refusal(400, f"the tokenizer of {served.name} has no chat template: it was not trained to chat; "
                      "use /v1/completions", "messages", "no_chat_template")  # fmt: skip
    _check_model(fields, served)
    ids = tuple(served.chat.encode(_messages(fields.take("messages"))))
    most = fields.integer("max_completion_tokens", None, 1)
    older = fields.integer("max_tokens", None, 1)
    if most is not None and older is not None:
        raise wrong("max_tokens", older, "is given beside max_completion_tokens; leave one of the two out")
    most = older if most is None else most
    stream, usage = _stream(fields)
    for name, none in _NOT_IN_CHATS.items():
        fields.only(name, none)
    fields.ignore(["parallel_tool_calls"])
    common = _common(fields, served, 1)
    fields.finish()
    _check_length(served, len(ids), 1 if most is None else most, "messages", "max_tokens")
    most = min(MAX_CHAT_TOKENS, served.length - len(ids)) if most is None else most
    requests = tuple(common.request(ids, most, choice, stream) for choice in range(common.n))
    return Asked(requests, (None,) * common.n, True, False, None, stream, usage, common.n)


@dataclass(frozen=True)
class _Common:
    """What completions and chats have in common."""

    sampling: Sampling
    seed: int
    n: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eod: bool

    def request(
        self, ids: tuple[int, ...], most: int, choice: int, stream: bool, logprobs: int | None = None,
        scored: bool = False,
    ) -> GenerationRequest:  # fmt: skip
        """Return what a choice asks of the engine; its seed is the request's and its number among the prompt's."""
        return GenerationRequest(
            ids, most, self.sampling, self.seed + choice, self.stop, self.stop_ids, self.ignore_eod,
            logprobs=logprobs is not None, prompt_logprobs=scored, top_logprobs=logprobs or 0, stream_text=stream,
        )  # fmt: skip


def _common(fields: Fields, served: Served, prompts: int) -> _Common:
    n = fields.integer("n", 1, 1)
    assert n is not None
    if n * prompts > served.choices:
        where = "prompt" if n == 1 else "n"
        raise wrong(where, n * prompts, f"so many continuations are wanted; one request has {served.choices:,} at most")
    temperature = fields.number("temperature", 1.0, lambda value: 0 <= value <= 100, "0 to 100")
    top_p = fields.number("top_p", 1.0, lambda value: 0 < value <= 1, "(0, 1]")
    penalty = fields.number("repetition_penalty", 1.0, lambda value: 0.01 <= value <= 100, "0.01 to 100")
    top_k = fields.integer("top_k", -1, -1, (1 << 31) - 1)
    if top_k == 0:
        raise wrong("top_k", 0, "must be at least 1; -1 samples among all tokens")
    seed = fields.integer("seed", None, 0, SEEDS - n)
    for name, none in _NOT_HERE.items():
        fields.only(name, none)
    fields.ignore(_HARMLESS)
    return _Common(
        Sampling(temperature, None if top_k == -1 else top_k, None if top_p == 1 else top_p, penalty),
        secrets.randbelow(SEEDS - n) if seed is None else seed,
        n,
        fields.texts("stop", 64, 4096),
        fields.ids("stop_token_ids", served.tokenizer.vocab_size, 64),
        fields.boolean("ignore_eos"),
    )


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.text("model")
    if name is not None and name != served.name:
        message = f"model={name[:60]!r} is not served here; {served.name!r} is"
        raise Refusal(404, message, "model", "model_not_found")


def _prompts(value: Any) -> list[Any]:
    """Prompts of a field that is a text, a list of texts, ids, or a list of lists of ids."""
    if value is None:
        raise wrong("prompt", None, "must be given: a text, token ids, or a list of these")
    if isinstance(value, str) or is_list_of_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value) or all(isinstance(one, list) for one in value):
            return value
        if all(isinstance(one, int) for one in value):
            raise wrong("prompt", value, "true and false are no token ids")
    raise wrong("prompt", value, "must be a text, token ids, or a list of these, and not empty")


def _prompt(value: Any, served: Served) -> tuple[str | None, tuple[int, ...]]:
    """Text, where it was given, and ids of a prompt."""
    if isinstance(value, list):
        if not is_list_of_ids(value):
            raise wrong("prompt", value, "must hold token ids, one at least")
        return None, checked_ids("prompt", value, served.tokenizer.vocab_size)
    if not value:
        eod = served.tokenizer.eod_id
        raise wrong("prompt", value, f"has no token; [{eod}], the end of a document, starts a new one")
    try:
        ids = served.tokenizer.encode(checked_text("prompt", value))
    except DataError as error:
        raise wrong("prompt", value, str(error)) from None
    if not ids:
        raise wrong("prompt", value, "the tokenizer makes no token of it")
    return value, tuple(ids)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "must be a list of messages, one at least")
    for message in value:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            raise wrong("messages", message["content"], "is a list of parts, and this server takes text alone: send "
                        "the text as content; images go to launch/generate.py --image")  # fmt: skip
        if not isinstance(message, dict) or not {"role", "content"} <= {
            key for key, text in message.items() if isinstance(text, str)
        }:
            raise wrong("messages", message, 'must hold objects such as {"role": "user", "content": "Hello"}')
        if unknown := set(message) - {"role", "content", "name"}:
            raise wrong("messages", min(unknown), "is no part of a message here")
        for text in message.values():
            if not isinstance(text, str):
                raise wrong("messages", text, "must be text")
            checked_text("messages", text)
    return value


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether a stream ends with the counts of tokens."""
    stream, options = fields.boolean("stream"), fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise wrong("stream_options", options, "has no effect without stream; leave it out")
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise wrong("stream_options", options, 'must be {"include_usage": true}')
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise wrong("stream_options", options, "include_usage must be true or false")
    return stream, usage


def _check_length(served: Served, prompt: int, most: int, prompt_name: str, most_name: str) -> None:
    if prompt + most <= served.length:
        return
    param = most_name if prompt < served.length else prompt_name
    message = (f"{param}: the prompt has {prompt:,} tokens and {most:,} are to be added; "
               f"this server takes {served.length:,} together, and cuts nothing")  # fmt: skip
    raise Refusal(400, message, param, "context_length_exceeded")

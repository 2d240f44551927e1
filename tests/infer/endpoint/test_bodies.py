"""Bodies that are refused, each with the parameter's name, and those that are taken."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mmdata.tokenizer import ByteTokenizer
from mmtrain.infer.endpoint.body import chat, completion
from mmtrain.infer.endpoint.fields import parse_body
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.endpoint.served import Served
from mmtrain.infer.sampling import Sampling
from tests.infer.endpoint.running import Running

SERVED = Served("tiny", ByteTokenizer(), length=100, choices=6, created=0)
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# Bytes of a body that is no object, with what the message says.
BROKEN = {
    b"": "no JSON",
    b"{": "no JSON",
    b"n": "no JSON",
    b'{"prompt": "a"} b': "no JSON",
    b"[]": "must be a JSON object, not a list",
    b'"a"': "must be a JSON object, not text",
    b"7": "must be a JSON object",
    b'{"prompt": "\xff"}': "not UTF-8",
    '{"prompt": "a"}'.encode("utf-16"): "not UTF-8",
    DEEP: "nested too deeply",
    b'{"prompt": "a", "temperature": NaN}': "NaN is no number of JSON",
    b'{"prompt": "a", "temperature": -Infinity}': "-Infinity is no number",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "no JSON",
}

# Fields of a body beside a good prompt, with the parameter that the refusal names and what it says.
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "must be given"),
    ({"prompt": ""}, "prompt", r"no token; \[256\]"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": [[]]}, "prompt", "token ids, one at least"),
    ({"prompt": ["a", ""]}, "prompt", "no token"),
    ({"prompt": ["a", 1]}, "prompt", "must be a text"),
    ({"prompt": [[1], "a"]}, "prompt", "must be a text"),
    ({"prompt": [[1, "a"]]}, "prompt", "must hold token ids"),
    ({"prompt": [1, True]}, "prompt", "true and false"),
    ({"prompt": [1.0]}, "prompt", "must be a text"),
    ({"prompt": {"text": "a"}}, "prompt", "must be a text"),
    ({"prompt": [257]}, "prompt", "no token id of this model: 0 to 256"),
    ({"prompt": [-1]}, "prompt", "no token id"),
    ({"prompt": [[1], [10**30]]}, "prompt", "no token id"),
    ({"prompt": "\ud800"}, "prompt", "no character"),
    ({"prompt": ["a"] * 7}, "prompt", "6 at most"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 0, "echo": True}, "max_tokens", "only with echo and logprobs"),
    ({"max_tokens": -5}, "max_tokens", "at least 0"),
    ({"max_tokens": "5"}, "max_tokens", "whole number"),
    ({"max_tokens": 5.0}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"max_tokens": 10**40}, "max_tokens", "takes 100 together"),
    ({"max_tokens": 100}, "max_tokens", "1 tokens and 100 are to be added"),
    ({"prompt": "a" * 101}, "prompt", "cuts nothing"),
    ({"temperature": -0.1}, "temperature", "0 to 100"),
    ({"temperature": 1e308}, "temperature", "0 to 100"),
    ({"temperature": 10**400}, "temperature", "0 to 100"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"temperature": False}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", r"\(0, 1\]"),
    ({"top_p": 1.01}, "top_p", r"\(0, 1\]"),
    ({"top_k": 0}, "top_k", "-1 samples among all"),
    ({"top_k": -2}, "top_k", "-1 to"),
    ({"top_k": 2**31}, "top_k", "-1 to"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0.01 to 100"),
    ({"seed": -1}, "seed", "0 to"),
    ({"seed": 2**63}, "seed", "0 to"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "0 to"),
    ({"seed": 1.5}, "seed", "whole number"),
    ({"stop": ""}, "stop", "1 to 4,096 characters"),
    ({"stop": ["a", ""]}, "stop", "1 to 4,096 characters"),
    ({"stop": [1]}, "stop", "list of texts"),
    ({"stop": {}}, "stop", "list of texts"),
    ({"stop": ["a"] * 65}, "stop", "64 are allowed"),
    ({"stop": "\udc00"}, "stop", "no character"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "no token id"),
    ({"stop_token_ids": 3}, "stop_token_ids", "list of 64"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 7}, "n", "6 at most"),
    ({"n": 2, "best_of": 3}, "best_of", "must be n, 2"),
    ({"echo": 1}, "echo", "true or false"),
    ({"logprobs": True}, "logprobs", "whole number"),
    ({"logprobs": 21}, "logprobs", "0 to 20"),
    ({"logprobs": 1, "stream": True}, "logprobs", "not sent with stream"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "no effect without stream"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "must be"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    ({"temprature": 0}, "temprature", "did you mean 'temperature'"),
    ({"messages": [], "prompt": "a"}, "messages", "no parameter"),
    ({"a\ud800": 1}, "a\\ud800", "no parameter"),
    ({"model": 5}, "model", "must be text"),
]


def test_bodies_that_are_no_object_are_refused_and_the_server_still_serves(server: Running) -> None:
    for data, told in BROKEN.items():
        status, error = server.refused(data or b" ")
        assert status == 400 and told in error["message"], data[:40]
        assert error["type"] == "invalid_request_error" and error["code"] == "invalid_json"
    assert server.complete(prompt="a", max_tokens=1)["choices"]


@pytest.mark.parametrize(("fields", "param", "told"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], param: str, told: str) -> None:
    body = json.dumps({"prompt": "a", **fields}).encode()
    with pytest.raises(Refusal, match=told) as caught:
        completion(parse_body(body), SERVED)
    assert caught.value.status == 400 and caught.value.param == param
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message


def test_wrong_fields_are_answered_400_and_the_server_still_serves(server: Running) -> None:
    for fields, param, _ in WRONG:
        if fields in ({"n": 7}, {"prompt": ["a"] * 7}, {"max_tokens": 100}, {"prompt": "a" * 101}):
            continue  # of smaller bounds than this server's
        status, error = server.refused({"prompt": "a", **fields})
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error"), fields
    assert server.refused({"prompt": "a", "model": "other"})[0] == 404
    assert server.complete(prompt="a", max_tokens=1, model="tiny")["choices"]


def asked(**fields: Any) -> Any:
    return completion(parse_body(json.dumps({"prompt": "a", **fields}).encode()), SERVED)


@pytest.mark.parametrize("stream", [True, False])
def test_text_is_made_as_it_comes_only_for_a_stream(stream: bool) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}], "stream": stream}
    served = replace(SERVED, chat=SimpleNamespace(encode=lambda messages: [97]))
    talk = chat(parse_body(json.dumps(messages).encode()), served)
    assert [one.stream_text for one in (*asked(stream=stream, n=2).requests, *talk.requests)] == [stream] * 3


def test_fields_without_an_effect_are_taken() -> None:
    usual = asked(user="me", metadata={"a": 1}, store=True, best_of=1, suffix="", presence_penalty=0, min_p=0.0,
                  frequency_penalty=0.0, logit_bias={}, stop=None, seed=3, model=None, top_k=-1)  # fmt: skip
    assert usual == asked(seed=3)
    (request,) = usual.requests
    assert (request.tokens, request.max_tokens, request.seed, request.stop) == ((97,), 16, 3, ())
    assert request.sampling == Sampling(temperature=1.0)


def test_every_field_reaches_the_engine() -> None:
    made = asked(prompt=[[1, 2], [3]], max_tokens=7, temperature=0.5, top_p=0.9, top_k=5, repetition_penalty=1.2, n=2,
                 seed=9, stop=["x", "yz"], stop_token_ids=[4, 5], ignore_eos=True, echo=True, logprobs=2)  # fmt: skip
    assert [(one.tokens, one.seed) for one in made.requests] == [((1, 2), 9), ((1, 2), 10), ((3,), 9), ((3,), 10)]
    for one in made.requests:
        assert one.sampling == Sampling(0.5, 5, 0.9, 1.2)
        assert (one.max_tokens, one.stop, one.stop_ids) == (7, ("x", "yz"), (4, 5))
        assert one.ignore_eod and one.logprobs and one.prompt_logprobs and one.top_logprobs == 2
    assert not asked(logprobs=2).requests[0].prompt_logprobs and not asked(echo=True).requests[0].prompt_logprobs

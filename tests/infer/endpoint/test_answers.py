"""Answers over HTTP are the engine's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmdata.tokenizer import ByteTokenizer
from mmtrain.infer.engine import Engine
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.generation import Finish, Generation, GenerationRequest
from tests.infer.chain import EOD, TEXT, chain_model
from tests.infer.endpoint.running import Running, running

BYTES = ByteTokenizer()
FINISH = {Finish.EOD: "stop", Finish.STOP: "stop", Finish.LENGTH: "length"}


def ids(text: str) -> tuple[int, ...]:
    return tuple(BYTES.encode(text))


def same(choice: dict[str, Any], made: Generation) -> bool:
    return (choice["text"], choice["finish_reason"]) == (made.text, FINISH[made.finish])


SAMPLED = dict(temperature=1.3, top_p=0.9, top_k=40, repetition_penalty=1.1)


@pytest.mark.parametrize("fields", [dict(temperature=0), dict(SAMPLED, seed=11), dict(temperature=0.7, seed=2**63 - 1)])
def test_an_answer_is_what_the_engine_generates(server: Running, twin: Engine, fields: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **{k: v for k, v in fields.items() if k != "seed"}})
    (made,) = twin.generate([GenerationRequest(ids("Once é"), 24, sampling, fields.get("seed", 0))])
    answer = server.complete(prompt="Once é", max_tokens=24, **fields)
    assert same(answer["choices"][0], made)
    assert answer["usage"]["prompt_tokens"] == 7 and answer["usage"]["completion_tokens"] == len(made.tokens)
    assert server.complete(prompt=list(ids("Once é")), max_tokens=24, **fields)["choices"] == answer["choices"]
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")


def test_without_a_seed_answers_differ_and_tokens_are_16(server: Running) -> None:
    answers = [server.complete(prompt="a", temperature=2) for _ in range(4)]
    assert len({one["choices"][0]["text"] for one in answers}) > 1
    assert server.complete(prompt="a", temperature=0, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_choices_of_several_prompts_have_seeds_that_count_up(server: Running, twin: Engine) -> None:
    texts = ["one", "second", "3"]
    requests = [GenerationRequest(ids(text), 9, Sampling(**SAMPLED), 5 + i) for text in texts for i in range(2)]
    made = twin.generate(requests)
    fields = dict(max_tokens=9, n=2, seed=5, **SAMPLED)
    for prompt in (texts, [list(ids(text)) for text in texts]):
        answer = server.complete(prompt=prompt, **fields)
        assert [one["index"] for one in answer["choices"]] == list(range(6))
        assert all(map(same, answer["choices"], made))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
        assert answer["usage"]["completion_tokens"] == sum(len(one.tokens) for one in made)
    alone = server.complete(prompt=texts[1], **fields)["choices"]
    assert [one["text"] for one in alone] == [one.text for one in made[2:4]]


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1) and parts[-1]["finish_reason"]
    return "".join(part["text"] for part in parts)


def test_streamed_text_joined_is_the_whole(server: Running) -> None:
    for fields in (dict(prompt="Once", max_tokens=40, seed=3), dict(prompt=["x", "yz"], n=2, seed=1, max_tokens=30)):
        whole = server.complete(**fields)
        events = server.stream(**fields, stream_options={"include_usage": True})
        assert [joined(events[:-1], one["index"]) for one in whole["choices"]] == [
            one["text"] for one in whole["choices"]
        ]
        assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
        assert len({event["id"] for event in events}) == 1 and len(events) > 5
    assert joined(server.stream(prompt="né", echo=True, temperature=0)).startswith("né")


def test_characters_of_several_bytes_are_never_split() -> None:
    with running(chain_model()) as server:
        events = server.stream(prompt="n", temperature=0, max_tokens=20)
        assert [one["choices"][0]["text"] for one in events] == [*"é€😀!", ""]
        assert joined(server.stream(prompt="n", temperature=0, max_tokens=3)) == "é\ufffd"


def test_a_stop_text_ends_an_answer_and_no_part_of_it_is_sent() -> None:
    with running(chain_model()) as server:
        for stop, text, finish in ((["😀"], "é€", "stop"), ("€😀!", "é", "stop"), ("€😀?", "é€😀!", "stop")):
            fields = dict(prompt="n", temperature=0, max_tokens=20, stop=stop)
            choice = server.complete(**fields)["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (text, finish)
            assert joined(server.stream(**fields)) == text
        fields = dict(prompt="n", temperature=0, max_tokens=20, stop_token_ids=[ord("!")])
        assert server.complete(**fields)["choices"][0]["text"] == "é€😀"
        fields = dict(prompt="n", temperature=0, max_tokens=15, ignore_eos=True)
        assert server.complete(**fields)["usage"]["completion_tokens"] == 15


def test_echoed_log_probabilities_are_the_engine_s_scores(server: Running, twin: Engine) -> None:
    text = "Once é upon"
    prompt = ids(text)
    (made,) = twin.generate([GenerationRequest(prompt, 5, logprobs=True)])
    for given in (text, list(prompt)):
        choice = server.complete(prompt=given, max_tokens=5, temperature=0, echo=True, logprobs=3)["choices"][0]
        told = choice["logprobs"]
        assert choice["text"] == text + made.text
        found = told["token_logprobs"]
        assert found[0] is None and told["top_logprobs"][0] is None
        assert found[1 : len(prompt)] == pytest.approx(twin.score(prompt), abs=1e-5)
        assert found[len(prompt) :][: len(made.tokens)] == pytest.approx(made.logprobs, abs=1e-5)
        assert told["token_ids"][: len(prompt)] == list(prompt)
        assert "".join(told["tokens"]) == choice["text"]
        starts = [sum(map(len, told["tokens"][:i])) for i in range(len(told["tokens"]))]
        assert told["text_offset"] == starts
        assert len({len(told[name]) for name in told}) == 1
        for likeliest, own in zip(told["top_logprobs"][1:], found[1:], strict=True):
            values = list(likeliest.values())
            assert own in values and max(values) >= own and len(values) <= 4
        assert all(max(best.values()) == own for best, own in
                   zip(told["top_logprobs"][len(prompt) :], found[len(prompt) :], strict=True))  # fmt: skip


def test_scores_without_a_new_token_and_without_the_likeliest(server: Running, twin: Engine) -> None:
    choice = server.complete(prompt="abcd", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == "abcd" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(twin.score(ids("abcd")), abs=1e-5)
    assert choice["logprobs"]["top_logprobs"] is None
    own = server.complete(prompt="abcd", max_tokens=3, temperature=0, logprobs=1)["choices"][0]["logprobs"]
    assert len(own["tokens"]) == 3 and own["text_offset"][0] == 0


def test_the_likeliest_tokens_are_those_of_the_whole_forward_pass(twin: Engine) -> None:
    from tests.infer.served import full_logits

    prompt = ids("Once upon")
    request = GenerationRequest(prompt, 2, logprobs=True, prompt_logprobs=True, top_logprobs=4)
    other = GenerationRequest(prompt[:4], 3, prompt_logprobs=True)
    made, plain = twin.generate([request, other])
    logprobs = full_logits(twin._model, (*prompt, *made.tokens)).log_softmax(-1)[:, : BYTES.vocab_size]
    rows = [*made.prompt_top_logprobs, *made.top_logprobs]
    assert [len(row) for row in rows] == [4] * (len(prompt) - 1 + len(made.top_logprobs))
    for place, row in enumerate(rows):
        best = logprobs[place].topk(4)
        assert [token for token, _ in row] == best.indices.tolist()
        assert [value for _, value in row] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert plain.prompt_top_logprobs == plain.top_logprobs == []


def test_one_entry_follows_a_prompt_whatever_was_chosen() -> None:
    """Readers count a prompt's tokens from both ends, with one new token asked for: its end is one too."""
    with running(chain_model(certainty=3.0)) as server:
        for prompt, last in (("né", 0xE2), (TEXT, EOD)):
            fields = dict(prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1)
            told = server.complete(**fields)["choices"][0]["logprobs"]
            assert len(told["token_logprobs"]) == len(ids(prompt)) + 1 and told["token_ids"][-1] == last
            assert told["token_logprobs"][-1] == pytest.approx(0, abs=0.2)


def test_clients_at_once_each_get_their_own_answer(server: Running, twin: Engine) -> None:
    prompts = [f"client {i} " * (1 + i % 4) for i in range(48)]
    made = twin.generate([GenerationRequest(ids(prompt), 12, Sampling(1.0), i) for i, prompt in enumerate(prompts)])

    def client(i: int) -> str:
        fields = dict(prompt=prompts[i], max_tokens=12, seed=i)
        return joined(server.stream(**fields)) if i % 2 else server.complete(**fields)["choices"][0]["text"]

    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(client, range(48))) == [one.text for one in made]
    assert len({one.text for one in made}) > 40
    assert len(server.engine.steppers) == 1

"""Ends, refusals, scores and books of the engine."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mmdata.tokenizer import ByteTokenizer, load_tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.generation import Finish, GenerationRequest, RequestRefused
from mmtrain.infer.serving.runner import Runner, StepOutOfMemory
from tests.infer.chain import TEXT, chain_model
from tests.infer.served import (
    MODELS,
    SMALL,
    assert_nothing_held,
    full_logits,
    greedy,
    request,
    seen_logits,
    served_model,
    text_of,
)

N = ord("n")


def chain_engine() -> Engine:
    return Engine(chain_model(), load_tokenizer("bytes"), SMALL)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_log_probabilities_of_the_whole_forward_pass(name: str) -> None:
    model = served_model(name)
    engine = Engine(model, options=replace(SMALL, prefill_tokens=11))
    texts = [text_of(length) for length in (30, 1, 2, 17)]
    for text, found in zip(texts, engine.score_all(texts), strict=True):
        full = full_logits(model, text).log_softmax(-1)
        assert found == pytest.approx([full[i, token].item() for i, token in enumerate(text[1:])], abs=1e-5)
    assert engine.score(texts[0]) == pytest.approx(engine.score_all(texts)[0], abs=1e-5)
    assert_nothing_held(engine)


def test_answers_to_one_context_read_it_once() -> None:
    model, context = served_model(), text_of(21)
    engine = Engine(model, options=replace(SMALL, prefix_slots=2))
    texts = [(*context, *text_of(length)) for length in (3, 1, 5)]
    first = engine.score(texts[0], 21)
    assert [first, *engine.score_all(texts[1:], [21, 21])] == [
        pytest.approx(engine.score(text)[20:], abs=1e-5) for text in texts
    ]
    assert engine.metrics.prefix_hit_tokens == 2 * 20
    assert engine.score(context, 21) == engine.score(context, 30) == [] and len(engine.score(context, 20)) == 1


def test_scores_and_continuations_share_steps_and_survive_a_pause() -> None:
    model, text = served_model(), text_of(30)
    engine = Engine(model, options=replace(SMALL, prefill_tokens=8))
    both = GenerationRequest(text, 4, prompt_logprobs=True)
    number = engine.submit(both)
    engine.step(), engine.step()
    engine.pause(number)
    engine.resume(number)
    news = [one for _ in range(9) for one in engine.step()][-1]
    assert news.generation is not None
    assert news.generation.prompt_logprobs == pytest.approx(engine.score(text), abs=1e-5)
    assert news.generation.tokens == engine.generate([request(text, 4)])[0].tokens


def test_a_continuation_ends_where_it_should() -> None:
    engine = chain_engine()

    def made(**rest: object) -> tuple[str, Finish, int]:
        (one,) = engine.generate([GenerationRequest((N,), **{"max_tokens": 20, **rest})])
        return one.text, one.finish, len(one.tokens)

    whole = TEXT[1:]
    assert made() == (whole, Finish.EOD, 10)
    assert made(max_tokens=2) == ("é", Finish.LENGTH, 2)
    assert made(max_tokens=4) == ("é\ufffd", Finish.LENGTH, 4)
    assert made(stop_ids=(ord("!"),)) == ("é€😀", Finish.STOP, 9)
    assert made(stop=("😀",)) == ("é€", Finish.STOP, 9)
    assert made(stop=("x", "€😀!", "😀!")) == ("é", Finish.STOP, 10)  # the earliest of those that end here
    assert made(stop=("😀x", "!n")) == (whole, Finish.EOD, 10)
    text, finish, tokens = made(ignore_eod=True, max_tokens=15)
    assert text.startswith(whole) and (finish, tokens) == (Finish.LENGTH, 15)
    assert_nothing_held(engine)


def test_streamed_text_never_holds_the_beginning_of_a_stop() -> None:
    engine = chain_engine()
    news = list(engine.stream([GenerationRequest((N,), 20, stop=("€😀?",))]))
    assert "".join(one.text for one in news) == TEXT[1:]
    assert [one.text for one in news if one.text] == ["é", "€😀!"]
    assert [one.token for one in news][-1] is None and news[-1].generation is not None


@pytest.mark.parametrize("most", [1, 2, 4, 9, 20])
def test_text_that_is_made_once_is_that_which_comes(most: int) -> None:
    engine, made = chain_engine(), []
    for streams in (True, False):
        news = list(engine.stream([GenerationRequest((N,), most, stream_text=streams)]))
        assert news[-1].generation is not None
        assert "".join(one.text for one in news) == news[-1].generation.text
        assert streams or not any(one.text for one in news[:-1])
        made.append(news[-1].generation)
    assert made[0] == made[1] and made[0].text
    assert engine.generate([GenerationRequest((N,), most)]) == made[:1]


def test_nobody_reads_the_text_of_what_is_generated_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = chain_engine(), []
    decode = ByteTokenizer.decode
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: calls.append(len(ids)) or decode(self, ids))
    (made,) = engine.generate([GenerationRequest((N,), 20)])
    assert made.text == TEXT[1:] and len(made.tokens) == 10 and len(calls) <= 2


def test_text_of_a_request_that_is_cancelled_is_what_was_certain() -> None:
    made = []
    for streams in (True, False):
        engine = chain_engine()
        number = engine.submit(GenerationRequest((N,), 20, stream_text=streams))
        for _ in range(4):
            engine.step()
        made.append(engine.cancel(number))
    assert made[0] == made[1] and made[0].text == "é" and len(made[0].tokens) == 4


def test_repetition_is_penalised_as_transformers_does() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    model = served_model()
    text = (*text_of(12), *greedy(model, text_of(12), 8), 7)  # of ids that it likes, before the first choice
    row, count = list(text), len(text)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(10):
        logits = full_logits(model, row)[-1:]
        row.append(int(processor(torch.tensor([row]), logits.clone())[0].argmax()))
    engine = Engine(model, options=SMALL)
    made = engine.generate([request(text, 10, sampling=Sampling(repetition_penalty=1.7)), request(text, 10)])
    assert made[0].tokens == row[count:] != made[1].tokens


WRONG = {
    "no tokens": (dict(tokens=()), "has no token"),
    "negative id": (dict(tokens=(3, -1)), "ids are 0 to 159"),
    "large id": (dict(tokens=(160,)), "request.tokens=160: is no id of this model"),
    "stop id": (dict(stop_ids=(160,)), "request.stop_ids=160"),
    "nothing wanted": (dict(max_tokens=0), "must be at least 1"),
    "seed": (dict(seed=-1), "seed=-1"),
    "empty stop": (dict(stop=("",)), "found everywhere"),
    "no tokenizer": (dict(stop=("x",)), "needs a tokenizer"),
    "score": (dict(score_from=0), "score_from=0: must be at least 1"),
    "prefix": (dict(keep_prefix=(4,)), "is no beginning of 3 tokens"),
    "temperature": (dict(sampling=Sampling(-1.0)), "--temperature"),
    "penalty": (dict(sampling=Sampling(repetition_penalty=0.0)), "--repetition-penalty"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_requests_that_make_no_sense_are_refused(wrong: str) -> None:
    engine, (options, told) = Engine(served_model("lightning"), options=SMALL), WRONG[wrong]
    with pytest.raises(ConfigError, match=told):
        engine.submit(GenerationRequest(**{"tokens": (1, 2, 3), **options}))
    assert engine.metrics.refused == 1 and engine.unfinished == 0


def test_a_request_that_can_never_fit_is_told_what_can() -> None:
    engine = Engine(served_model(), options=replace(SMALL, max_running=1, longest=36))
    assert engine.plan.longest == 40
    with pytest.raises(RequestRefused, match=r"tokens=41 tokens: 30 of the prompt and 11 new; the cache holds 40;"):
        engine.submit(request(text_of(30), 11))
    with pytest.raises(RequestRefused):  # and none of the others stays behind
        engine.generate([request(text_of(5)), request(text_of(41))])
    assert_nothing_held(engine)
    assert len(engine.generate([request(text_of(30), 10)])[0].tokens) == 10
    assert Engine(served_model("lightning"), options=SMALL).plan.longest is None  # a state has any length


def test_memory_that_is_too_small_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"engine\.memory_bytes=0\.0 MiB: one takes"):
        Engine(served_model(), options=replace(SMALL, memory_bytes=20_000))
    with pytest.raises(ConfigError, match="memory_share"):
        Engine(served_model(), options=replace(SMALL, memory_share=0.0))


def test_memory_is_planned_within_its_size() -> None:
    for name in MODELS:
        for size in (100_000, 1_000_000):
            engine = Engine(served_model(name), options=replace(SMALL, memory_bytes=size, prefix_slots=4))
            taken = sum(value.numel() * 4 for layer in engine.memory.layers for value in vars(layer).values())
            assert taken == engine.plan.bytes <= size
            assert engine.plan.paged == ("S" in MODELS[name]["layer_pattern"])


def test_requests_that_are_cancelled_anywhere_leave_nothing() -> None:
    engine = Engine(
        served_model(), options=replace(SMALL, prefill_tokens=8, max_running=3, prefix_slots=2, prefix_interval=8)
    )
    rng = random.Random(0)
    for _ in range(30):
        numbers = [engine.submit(request(text_of(rng.randint(1, 40), seed=n), 5)) for n in range(rng.randint(1, 6))]
        ended: set[int] = set()
        for _ in range(rng.randint(0, 14)):
            ended |= {news.id for news in engine.step() if news.generation is not None}
        left = [number for number in numbers if number not in ended]
        rng.shuffle(left)
        for number in left:
            if rng.random() < 0.3:
                engine.pause(number)
            assert engine.cancel(number).finish == Finish.CANCELLED
        with pytest.raises(ConfigError, match="no such request"):
            engine.cancel(numbers[0])
    assert engine.metrics.cancelled > 30 and engine.metrics.finished > 5
    assert_nothing_held(engine)


def test_a_stream_that_is_left_takes_its_requests_back() -> None:
    engine = Engine(served_model(), options=SMALL)
    for _ in engine.stream([request(text_of(5)), request(text_of(6))]):
        break
    assert_nothing_held(engine)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_short_requests_leave_nothing(count: int) -> None:
    model = served_model("softmax")
    engine = Engine(model, options=replace(SMALL, max_running=32, prefix_slots=4, prefix_interval=4))
    rng = random.Random(1)
    requests = [request(text_of(rng.randint(1, 9), seed=rng.randint(0, 50)), rng.randint(1, 3)) for _ in range(count)]
    assert sum(len(one.tokens) for one in engine.generate(requests)) == sum(one.max_tokens for one in requests)
    assert engine.metrics.finished == count and engine.metrics.prefix_hits > 0
    assert_nothing_held(engine)


def test_a_step_beyond_the_memory_is_one_line_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served_model(), options=SMALL)

    def fail(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_pass", fail)
        with pytest.raises(StepOutOfMemory, match="a step of 5 tokens: does not fit into the memory of cpu"):
            engine.generate([request(text_of(5))])
    assert_nothing_held(engine)
    assert len(engine.generate([request(text_of(5))])[0].tokens) == 6


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), KeyboardInterrupt()])
def test_a_step_that_breaks_off_between_layers_is_done_again_from_the_start(error: BaseException) -> None:
    model, texts = served_model(), [text_of(length) for length in (5, 30)]
    engine = Engine(model, options=replace(SMALL, prefill_tokens=16, prefix_slots=2, prefix_interval=8))
    numbers = [engine.submit(request(text, 8)) for text in texts]
    made = {number: [] for number in numbers}
    for step in range(20):
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(seen_logits())
            if step in (1, 5):
                stack.enter_context(mock.patch.object(model.layers[2], "forward", side_effect=error))
                stack.enter_context(pytest.raises((StepOutOfMemory, KeyboardInterrupt)))
            for news in engine.step():
                made[news.id].append(news.token)
        for tokens, logits_V in seen.items():
            torch.testing.assert_close(logits_V, full_logits(model, tokens)[-1], rtol=0, atol=1e-5)
    assert list(made.values()) == [greedy(model, text, 8) for text in texts]
    assert_nothing_held(engine)


def test_memory_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(ConfigError, match="GiB: cannot be had on cpu; give less"):
        Engine(served_model(), options=replace(SMALL, memory_bytes=1 << 58))


def test_weights_that_give_no_numbers_are_named() -> None:
    model = served_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ConfigError, match="logits that are not finite"):
        Engine(model, options=SMALL).generate([request(text_of(5))])


def test_a_paused_request_alone_is_no_endless_loop() -> None:
    engine = Engine(served_model(), options=SMALL)
    stream = engine.stream([request(text_of(5))])
    engine.pause(next(stream).id)
    with pytest.raises(ConfigError, match="is paused"):
        next(stream)
    assert_nothing_held(engine)


def test_a_stream_that_is_closed_between_the_news_of_a_step_cancels_what_is_unfinished_alone() -> None:
    engine = Engine(served_model(), options=SMALL)
    stream = engine.stream([request(text_of(3), 1), request(text_of(4), 1), request(text_of(5), 9)])
    next(stream)
    stream.close()
    assert engine.metrics.finished == 2 and engine.metrics.cancelled == 1
    assert_nothing_held(engine)

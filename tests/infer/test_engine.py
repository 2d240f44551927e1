"""The engine gives every request what the whole forward pass gives it alone, however its tokens are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmtrain.infer.engine import Engine
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.generation import GenerationRequest
from tests.infer.served import (
    MODELS,
    SMALL,
    assert_nothing_held,
    full_logits,
    greedy,
    request,
    seen_logits,
    served_model,
    state_of,
    text_of,
)
from tests.model.mixers.running_mean import registered
from tests.model.small import relative, small_model

LENGTHS, NEW = (37, 1, 12, 64, 5), 6


def assert_whole(model: torch.nn.Module, seen: dict[tuple[int, ...], Tensor], row: tuple[int, ...], new: int) -> None:
    """The engine sampled from the logits of the whole forward pass after each of the row's last tokens."""
    full = full_logits(model, row)
    for length in range(len(row) - new, len(row)):
        torch.testing.assert_close(seen[row[:length]], full[length - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefill_tokens", [1, 7, 31, 4096])
def test_requests_of_all_lengths_in_pieces_of_all_sizes(name: str, prefill_tokens: int) -> None:
    model = served_model(name)
    texts = [text_of(length) for length in LENGTHS]
    # Trained with dropping, whose capacity would be a quarter.
    engine = Engine(model.train(), options=replace(SMALL, prefill_tokens=prefill_tokens, max_running=3))
    with seen_logits() as seen:
        made = engine.generate([request(text, NEW) for text in texts])
    for text, one in zip(texts, made, strict=True):
        assert one.tokens == greedy(model, text, NEW)
        assert_whole(model, seen, (*text, *one.tokens), NEW)
    assert engine.metrics.prefill_tokens + engine.metrics.decode_tokens == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
    assert_nothing_held(engine)


@pytest.mark.parametrize("name", MODELS)
def test_the_states_do_not_depend_on_the_way_to_them(name: str) -> None:
    model, text = served_model(name), text_of(37)
    others = [request(text_of(length, seed=9), 30) for length in (3, 20, 11)]

    def states(prefill_tokens: int, company: bool, pause_after: int | None = None) -> list[Tensor]:
        engine = Engine(model, options=replace(SMALL, prefill_tokens=prefill_tokens))
        numbers = [engine.submit(one) for one in (others if company else [])]
        mine, tokens = engine.submit(request(text, 30)), 0
        while tokens < 8:
            news = [one.token for one in engine.step() if one.id == mine]
            tokens += len(news)
            if news and tokens == pause_after:
                engine.pause(mine)
                engine.step()
                assert engine.why_waiting(mine) == "was paused"
                engine.resume(mine)
        found = state_of(engine, mine)
        for number in (*numbers, mine):
            engine.cancel(number)
        assert_nothing_held(engine)
        return found

    expected = states(4096, company=False)
    for way in ((1, False, None), (7, True, None), (4096, True, 3), (13, False, 5)):
        for ours, theirs in zip(states(*way), expected, strict=True):
            assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["hybrid with experts", "softmax"])
def test_requests_that_give_their_pages_to_older_ones_go_on_the_same(name: str) -> None:
    model, texts = served_model(name), [text_of(length) for length in (20, 21, 22, 23)]
    engine = Engine(model, options=replace(SMALL, max_running=4, longest=20))
    assert engine.plan.pages == 24  # enough for all prompts; in the end they are 43
    with seen_logits() as seen:
        made = engine.generate([request(text, 20) for text in texts])
    assert engine.metrics.preempted > 0
    for text, one in zip(texts, made, strict=True):
        assert one.tokens == greedy(model, text, 20)
        assert_whole(model, seen, (*text, *one.tokens), 20)
    assert_nothing_held(engine)


def test_a_long_prompt_holds_nobody_up() -> None:
    model = served_model()
    engine = Engine(model, options=replace(SMALL, prefill_tokens=8))
    short = engine.submit(request(text_of(4), 20))
    engine.step()
    long = engine.submit(request(text_of(64), 4))
    for _ in range(7):  # 64 tokens, 8 a step
        assert [news.id for news in engine.step()] == [short]
    assert {news.id for news in engine.step()} == {short, long}


def test_waiting_requests_join_as_others_leave() -> None:
    engine = Engine(served_model(), options=replace(SMALL, max_running=2))
    numbers = [engine.submit(request(text_of(3, seed=n), 2 + n)) for n in range(4)]
    engine.step()
    assert [engine.why_waiting(number) for number in numbers] == [
        "", "", "all 2 requests that may run at once do", "1 requests are before it"
    ]  # fmt: skip
    order = [news.id for _ in range(20) for news in engine.step() if news.generation is not None]
    assert order == numbers
    assert_nothing_held(engine)


def test_a_request_samples_the_same_alone_and_in_any_company() -> None:
    model = served_model()
    rules = [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.9), Sampling(), Sampling(2.0, 50, 0.8, 1.3)]
    requests = [
        GenerationRequest(text_of(9, seed=n), 12, sampling=rule, seed=n, logprobs=True) for n, rule in enumerate(rules)
    ]
    alone = [Engine(model, options=SMALL).generate([one])[0] for one in requests]
    together = Engine(model, options=replace(SMALL, prefill_tokens=5)).generate(requests[::-1])[::-1]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in alone}) == len(rules)
    for one, asked in zip(alone, requests, strict=True):
        full = full_logits(model, (*asked.tokens, *one.tokens)).log_softmax(-1)
        expected = [full[8 + i, token].item() for i, token in enumerate(one.tokens)]
        assert one.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_third_mixer_is_served_by_its_entry_alone() -> None:
    with registered():
        model, texts = small_model(num_layers=3, layer_pattern="LMS").eval(), [text_of(length) for length in (17, 4)]
        engine = Engine(model, options=replace(SMALL, prefill_tokens=6, prefix_slots=2))
        for _ in range(2):
            made = engine.generate([request(text, 5, keep_prefix=(len(text) - 1,)) for text in texts])
            assert [one.tokens for one in made] == [greedy(model, text, 5) for text in texts]
        assert [one.prefix_tokens for one in made] == [16, 3]
        assert_nothing_held(engine)

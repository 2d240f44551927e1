"""The prefix cache: a hit at any boundary changes nothing but the work, and what is kept makes room when it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.infer.engine import Engine
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
from tests.model.small import relative

CACHED = replace(SMALL, prefix_slots=4, prefix_interval=None)


@pytest.mark.parametrize("name", MODELS)
def test_a_hit_at_any_boundary_gives_the_logits_of_none(name: str) -> None:
    model, text = served_model(name), text_of(13)
    full, states = full_logits(model, text), []
    for boundary in [None, *range(1, 13)]:
        engine = Engine(model, options=CACHED)
        if boundary is not None:
            # The first writes on behind the prefix, in the same page, before the second reads it.
            first = (*text[:boundary], *text_of(9, seed=7))
            assert engine.generate([request(first, 3, keep_prefix=(boundary,))])[0].prefix_tokens == 0
        with seen_logits() as seen:
            number = engine.submit(request(text, 3))
            engine.step()
        torch.testing.assert_close(seen[text], full[-1], rtol=0, atol=1e-5)
        assert engine.metrics.prefix_hit_tokens == (boundary or 0)
        states.append(state_of(engine, number))
        engine.cancel(number)
        assert_nothing_held(engine)
    for found in states[1:]:
        assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(found, states[0], strict=True))


def test_the_interval_keeps_boundaries_and_the_longest_serves() -> None:
    engine = Engine(served_model(), options=replace(CACHED, prefix_interval=8, prefix_slots=8))
    text = text_of(30)
    engine.generate([request(text)])
    made = engine.generate([request(text), request((*text[:17], 3)), request(text[:16]), request(text[:5])])
    assert [one.prefix_tokens for one in made] == [24, 16, 8, 0]  # a token at least is read, for its logits
    assert [one.tokens for one in made[:1]] == [greedy(engine._model, text, 6)]
    metrics = engine.metrics
    assert (metrics.prefix_lookups, metrics.prefix_hits) == (5, 3)
    assert metrics.prefix_hit_rate == pytest.approx(48 / (30 + 30 + 18 + 16 + 5))
    assert_nothing_held(engine)


def test_a_long_prompt_takes_half_of_the_slots() -> None:
    engine = Engine(served_model("lightning"), options=replace(CACHED, prefix_interval=4, prefix_slots=4))
    short, long = text_of(9, seed=3), text_of(64)
    engine.generate([request(short)])
    engine.generate([request(long)])
    assert sorted(engine._scheduler.prefixes._lengths.elements()) == [4, 8, 32, 64]
    assert [one.prefix_tokens for one in engine.generate([request(short), request((*long, 1))])] == [8, 64]


def test_another_token_anywhere_is_another_prefix() -> None:
    engine = Engine(served_model(), options=CACHED)
    text = text_of(12)
    engine.generate([request(text, keep_prefix=(10,))])
    for place in range(10):
        changed = (*text[:place], (text[place] + 1) % 160, *text[place + 1 :])
        assert engine.generate([request(changed)])[0].prefix_tokens == 0
    assert engine.generate([request(text)])[0].prefix_tokens == 10


def test_the_least_recently_used_goes_first() -> None:
    engine = Engine(served_model(), options=replace(CACHED, prefix_slots=2))
    texts = [text_of(10, seed=n) for n in range(3)]

    def hit(n: int) -> bool:
        return engine.generate([request(texts[n])])[0].prefix_tokens > 0

    engine.generate([request(text, keep_prefix=(9,)) for text in texts[:2]])
    assert hit(0)
    engine.generate([request(texts[2], keep_prefix=(9,))])
    assert [hit(n) for n in range(3)] == [True, False, True]
    assert_nothing_held(engine)


def test_kept_prefixes_make_room_for_requests_and_shared_pages_outlive_them() -> None:
    model = served_model()
    engine = Engine(model, options=replace(CACHED, max_running=1, prefix_slots=2, longest=9))
    assert engine.plan.pages == 12
    text = text_of(32)
    engine.generate([request(text, 3, keep_prefix=(16, 31))])
    assert engine.memory.pages.free == 4
    number = engine.submit(request(text, 12))  # 11 pages, of which 7 are shared and one is copied
    with seen_logits() as seen:
        for _ in range(10):
            engine.step()
    assert len(engine._scheduler.prefixes) == 2
    row = (*text, *greedy(model, text, 9))
    torch.testing.assert_close(seen[row], full_logits(model, row)[-1], rtol=0, atol=1e-5)
    engine.cancel(number)
    other = text_of(40, seed=1)
    assert engine.generate([request(other, 6)])[0].tokens == greedy(model, other, 6)  # needs all 12
    assert len(engine._scheduler.prefixes) == 0
    assert_nothing_held(engine)


def test_a_prefix_that_leaves_no_room_for_its_own_request_gives_way() -> None:
    model = served_model()
    engine = Engine(model, options=replace(CACHED, max_running=1, prefix_slots=1, longest=9))
    text = text_of(22)
    assert engine.plan.pages == 8
    engine.generate([request(text, 2, keep_prefix=(21,))])
    assert engine.generate([request(text, 10)])[0].tokens == greedy(model, text, 10)  # all 8, the copied page a ninth
    assert_nothing_held(engine)


def test_prompts_whose_scores_are_wanted_are_read_whole() -> None:
    engine = Engine(served_model(), options=CACHED)
    text = text_of(20)
    engine.generate([request(text, keep_prefix=(15,))])
    assert len(engine.score(text)) == 19 and engine.metrics.prefix_hits == 0


def test_a_cache_that_never_hits_is_told_once() -> None:
    said: list[str] = []
    options = replace(CACHED, prefix_interval=4, warn_after=5)
    engine = Engine(served_model(), options=options, warn=said.append)
    engine.generate([request(text_of(6, seed=n), 1) for n in range(4)])
    assert said == []
    engine.generate([request(text_of(6, seed=n), 1) for n in range(4, 9)])
    assert len(said) == 1 and "prefix_slots=0" in said[0]
    used = Engine(served_model(), options=options, warn=said.append)
    for _ in range(9):
        used.generate([request(text_of(6), 1)])
    assert len(said) == 1

"""Short pieces of prompts in one row with decode steps: logits and states as without, and nothing else is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmkernels.softmax import softmax_paged_step
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving import mixed_graphs
from mmtrain.infer.serving.mixed_graphs import MixedGraphs, MixedShape
from mmtrain.model.mixers import mixed_batch
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

PADDED = replace(SMALL, cuda_graphs=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("piece", [5, 40, 64])
def test_prompts_that_join_others_at_work(name: str, piece: int) -> None:
    model = served_model(name)
    engine = Engine(model, options=replace(PADDED, prefill_tokens=piece))
    lengths, joined = (7, 45, 2, 31, 1, 60), []
    with (
        seen_logits() as seen,
        mock.patch.object(MixedGraphs, "run", autospec=True, side_effect=MixedGraphs.run) as run,
    ):
        numbers = []
        for length in lengths:  # one more with every two steps
            numbers.append(engine.submit(request(text_of(length), 9)))
            joined += [*engine.step(), *engine.step()]
        while engine.at_work:
            joined += engine.step()
    done = {news.id: news.generation for news in joined if news.generation is not None}
    assert any(call.args[1].decode and call.args[1].prefill for call in run.call_args_list)
    for number, length in zip(numbers, lengths, strict=True):
        assert done[number].tokens == greedy(model, text_of(length), 9)
    for tokens, logits_V in seen.items():
        torch.testing.assert_close(logits_V, full_logits(model, tokens)[-1], rtol=1e-5, atol=1e-5)
    assert_nothing_held(engine)


@pytest.mark.parametrize("name", MODELS)
def test_states_are_the_same_and_nothing_else_is_touched(name: str) -> None:
    model, states = served_model(name), []
    for options in (SMALL, PADDED):
        engine = Engine(model, options=replace(options, prefill_tokens=20))
        for layer in engine.memory.layers:
            for tensor in vars(layer).values():
                tensor.fill_(7.0)
        numbers = [engine.submit(request(text_of(length), 30)) for length in (3, 41, 5, 18)]
        for _ in range(6):
            engine.step()
        states.append([state_of(engine, number) for number in numbers])
        owned = {page for number in numbers for page in engine._documents[number].pages}
        slots = {engine._documents[number].slot for number in numbers}
        for layer in engine.memory.layers:
            for tensor in vars(layer).values():
                mine = slots if hasattr(layer, "states_SHKK") else owned
                assert (tensor[[i for i in range(len(tensor)) if i not in mine]] == 7.0).all()
    for plain, padded in zip(*states, strict=True):
        for one, other in zip(plain, padded, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_keys_of_a_piece_are_there_before_any_of_them_is_read() -> None:
    """On a GPU the step's programs run in any order; here they would find each other's keys all the same."""
    engine, seen = Engine(served_model("softmax"), options=PADDED), []

    def step(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, keys: Tensor) -> Any:
        rows = keys.nonzero().flatten()  # no decode step is among them
        last, size = keys[rows] - 1, k_pages.shape[1]
        places = table[rows, last // size] * size + last % size
        for pages, new in ((k_pages, k), (v_pages, v)):
            assert torch.equal(pages.flatten(0, 1)[places], new[rows])
        seen.append(len(rows))
        return softmax_paged_step(q, k, v, k_pages, v_pages, table, keys)

    with mock.patch.object(mixed_batch, "softmax_paged_step", step):
        engine.generate([request(text_of(21), 1)])
    assert seen == [21, 21]  # a layer each


def test_prefixes_and_scores_of_prompts() -> None:
    model, text = served_model(), text_of(33)
    engine = Engine(model, options=replace(PADDED, prefix_slots=4, prefix_interval=8, prefill_tokens=24))
    plain = Engine(model, options=SMALL)
    with mock.patch.object(MixedGraphs, "run", autospec=True, side_effect=MixedGraphs.run) as run:
        first, again = (engine.generate([request(text, 6)])[0] for _ in range(2))
        assert engine.score(text) == pytest.approx(plain.score(text), abs=1e-5)
    assert len(run.call_args_list) >= 4
    assert again.tokens == first.tokens == greedy(model, text, 6) and again.prefix_tokens == 32


def test_rows_are_padded_to_few_shapes() -> None:
    engine = Engine(served_model(), options=replace(PADDED, prefill_tokens=200))
    with mock.patch.object(MixedGraphs, "_forward", autospec=True, side_effect=MixedGraphs._forward) as run:
        for lengths in ((3,), (33,), (3, 4, 5), (100, 60)):
            engine.generate([request(text_of(length), 1) for length in lengths])
    pages = engine.plan.pages
    width = 64 if pages > 64 else pages
    assert [call.args[1] for call in run.call_args_list] == [
        MixedShape(0, 32, 2, width), MixedShape(0, 64, 2, width), MixedShape(0, 32, 8, width),
        MixedShape(0, 256, 8, width),
    ]  # fmt: skip


@pytest.mark.parametrize(("most", "taken"), [(32 * 64, True), (32 * 64 - 1, False)])
def test_documents_of_many_pages_take_passes_of_their_own(
    most: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has its document's table of pages, which a long context would make long for the shortest prompt."""
    monkeypatch.setattr(mixed_graphs, "MOST_ENTRIES", most)
    model = served_model("softmax")
    engine = Engine(model, options=PADDED)
    assert engine.plan.pages > 64  # so that the narrowest table has 64
    with mock.patch.object(MixedGraphs, "run", autospec=True, side_effect=MixedGraphs.run) as run:
        made = engine.generate([request(text_of(20), 3)])
    assert bool(run.call_args_list) == taken and made[0].tokens == greedy(model, text_of(20), 3)


@pytest.mark.parametrize(
    ("lengths", "reads", "taken"),
    [((200, 56), 2**19, True), ((200, 57), 2**19, False), ((2,) * 7, 2**19, True), ((2,) * 8, 2**19, False),
     ((20,), 400, True), ((20,), 399, False)],
)  # fmt: skip
def test_long_or_many_pieces_take_a_pass_of_their_own(
    lengths: tuple[int, ...], reads: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_graphs, "MOST_READS", reads)
    model = served_model("lightning")
    engine = Engine(model, options=replace(PADDED, prefill_tokens=300))
    with mock.patch.object(MixedGraphs, "run", autospec=True, side_effect=MixedGraphs.run) as run:
        made = engine.generate([request(text_of(length), 1) for length in lengths])
    assert bool(run.call_args_list) == taken
    assert [one.tokens for one in made] == [greedy(model, text_of(length), 1) for length in lengths]

"""Decode steps padded to the sizes of graphs: tokens, logits and states as without, and nothing else is touched."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving import decode_graphs
from mmtrain.infer.serving.decode_graphs import DecodeGraphs, ladder, widths
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.mixed_graphs import MixedGraphs
from mmtrain.infer.serving.staging import Staging
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
from tests.model.small import small_model

PADDED = replace(SMALL, cuda_graphs=True)
LENGTHS = (1, 9, 4, 17, 30)


@contextmanager
def sizes_sent() -> Iterator[tuple[list[int], list[int]]]:
    """Collects how many numbers go to the device in the copy of each step, and in copies of their own."""
    at_once: list[int] = []
    apart: list[int] = []
    send = Staging.send

    def note(self: Staging, numbers: list[int]) -> None:
        at_once.append(len(numbers))
        send(self, numbers)

    def note_apart(x: torch.Tensor, device: object) -> torch.Tensor:
        apart.append(len(x))
        return x

    with mock.patch.object(Staging, "send", note), mock.patch.object(decode_graphs, "to_device", note_apart):
        yield at_once, apart


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [PADDED, replace(PADDED, prefill_tokens=3)], ids=["whole", "pieces of 3"])
def test_tokens_and_logits_are_those_of_whole_passes(name: str, options: object) -> None:
    model = served_model(name)
    engine = Engine(model, options=options)
    with (
        seen_logits() as seen,
        mock.patch.object(DecodeGraphs, "run", autospec=True, side_effect=DecodeGraphs.run) as run,
        mock.patch.object(MixedGraphs, "takes", return_value=False),
    ):
        made = engine.generate([request(text_of(length), 5 + length % 3) for length in LENGTHS])
    assert len({len(call.args[1]) for call in run.call_args_list}) > 1
    for length, one in zip(LENGTHS, made, strict=True):
        assert one.tokens == greedy(model, text_of(length), 5 + length % 3)
    for tokens, logits_V in seen.items():
        torch.testing.assert_close(logits_V, full_logits(model, tokens)[-1], rtol=1e-5, atol=1e-5)
    assert_nothing_held(engine)


def test_states_are_the_same_and_places_without_a_document_touch_nothing() -> None:
    model = served_model()
    engines = [Engine(model, options=options) for options in (SMALL, PADDED)]
    states = []
    for engine in engines:
        for layer in engine.memory.layers:  # what nobody owns must stay as it is
            for name in ("states_SHKK", "k_PLGK", "v_PLGK"):
                if hasattr(layer, name):
                    getattr(layer, name).fill_(7.0)
        numbers = [engine.submit(request(text_of(length), 20)) for length in (3, 8, 5)]
        for _ in range(6):
            engine.step()
        states.append([state_of(engine, number) for number in numbers])
        owned = {page for number in numbers for page in engine._documents[number].pages}
        slots = {engine._documents[number].slot for number in numbers}
        for layer in engine.memory.layers:
            if hasattr(layer, "states_SHKK"):
                free = [slot for slot in range(len(layer.states_SHKK)) if slot not in slots]
                assert (layer.states_SHKK[free] == 7.0).all()
            else:
                free = [page for page in range(len(layer.k_PLGK)) if page not in owned]
                assert (layer.k_PLGK[free] == 7.0).all() and (layer.v_PLGK[free] == 7.0).all()
    for plain, padded in zip(*states, strict=True):
        for one, other in zip(plain, padded, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_prefixes_and_scores_go_on_in_padded_steps() -> None:
    model = served_model()
    engine = Engine(model, options=replace(PADDED, prefix_slots=4, prefix_interval=8))
    text = text_of(17)
    first, again = (engine.generate([request(text, 6)])[0] for _ in range(2))
    assert again.tokens == first.tokens == greedy(model, text, 6) and again.prefix_tokens == 16
    plain = Engine(model, options=SMALL)
    assert engine.score(text) == pytest.approx(plain.score(text), abs=1e-5)


def test_tables_of_several_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "_LEAST_PAGES", 2)
    model = served_model("softmax")
    engine = Engine(model, options=PADDED)
    seen = set()
    forward = DecodeGraphs._forward

    def note(self: DecodeGraphs, size: int, width: int) -> object:
        seen.add(width)
        return forward(self, size, width)

    with mock.patch.object(DecodeGraphs, "_forward", note):
        made = engine.generate([request(text_of(3), 40), request(text_of(2), 4)])
    assert made[0].tokens == greedy(model, text_of(3), 40)
    assert seen == {2, 8, 32}


def test_a_longer_document_leaves_nothing_behind_in_the_table() -> None:
    model = served_model("softmax")
    engine = Engine(model, options=PADDED)
    engine.generate([request(text_of(60), 3), request(text_of(50), 3)])
    made = engine.generate([request(text_of(2), 9), request(text_of(5), 9)])
    assert [one.tokens for one in made] == [greedy(model, text_of(n), 9) for n in (2, 5)]


@pytest.mark.parametrize(
    ("most", "want"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]),
                       (17, [1, 2, 4, 8, 16, 32]), (64, [1, 2, 4, 8, 16, 32, 48, 64])]
)  # fmt: skip
def test_ladder(most: int, want: list[int]) -> None:
    assert ladder(most) == want


def test_widths() -> None:
    assert widths(0) == [0] and widths(5) == [5] and widths(64) == [64]
    assert widths(16384) == [64, 256, 1024, 4096, 16384] and widths(300) == [64, 256, 300]


def test_refusals() -> None:
    with registered():
        model = small_model(num_layers=2, layer_pattern="LM")
        with pytest.raises(ConfigError, match=r"engine.cuda_graphs.*takes no padding"):
            Engine(model, options=PADDED)
        engine = Engine(model, options=SMALL)
        assert engine.generate([request(text_of(4), 3)])[0].tokens == greedy(model, text_of(4), 3)


def test_documents_are_given_in_their_order() -> None:
    model = served_model()
    engine = Engine(model, options=PADDED)
    seen: list[list[Document]] = []
    run = DecodeGraphs.run

    def note(self: DecodeGraphs, documents: list[Document]) -> object:
        seen.append(list(documents))
        logits_NV = run(self, documents)
        assert len(logits_NV) == len(documents)
        return logits_NV

    with mock.patch.object(DecodeGraphs, "run", note):
        engine.generate([request(text_of(length), 4) for length in (3, 6, 2)])
    assert max(map(len, seen)) == 3


def test_a_step_sends_its_numbers_and_new_pages_in_one_copy() -> None:
    engine = Engine(served_model(), options=PADDED)  # pages of 4 tokens
    for length in (4, 6):  # the first token of a decode step is the 5th and the 7th: pages change at the 9th
        engine.submit(request(text_of(length), 12))
    with sizes_sent() as (at_once, apart):
        for _ in range(7):
            engine.step()
    numbers, entry = 3 * 2, 2  # of two documents; a place in the table and the page there
    assert at_once == [numbers + 4 * entry, numbers, numbers + entry, numbers, numbers + entry, numbers]
    assert not apart


def test_whole_rows_of_documents_that_came_are_sent_apart() -> None:
    model = served_model("softmax")
    engine = Engine(model, options=replace(PADDED, max_running=1))
    with sizes_sent() as (at_once, apart):
        made = engine.generate([request(text_of(9), 6)])[0]
    assert made.tokens == greedy(model, text_of(9), 6)
    assert apart == [2 * 3] and set(at_once) == {6, 8}  # three numbers, each with one beside it; an entry more


def test_graphs_read_what_documents_have_whoever_came_or_went_before() -> None:
    engine = Engine(served_model("softmax"), options=replace(PADDED, memory_bytes=1 << 17))  # 32 pages
    documents: list[Document] = []
    run, forward = DecodeGraphs.run, DecodeGraphs._forward
    seen = Counter()

    def note(self: DecodeGraphs, given: list[Document]) -> object:
        documents[:] = given
        return run(self, given)

    def check(self: DecodeGraphs, size: int, width: int) -> object:
        numbers_3N, count = self._staging.there[: 3 * (size + size % 2)].view(3, -1)[:, :size], len(documents)
        want = [[document.tokens[-1], len(document.tokens), document.slot] for document in documents]
        assert numbers_3N.T.tolist() == want + [[0, 0, -1]] * (size - count)
        for row, document in enumerate(documents):
            assert self._table_NM[row, : len(document.pages)].tolist() == list(document.pages)
        seen[size] += 1
        return forward(self, size, width)

    draw = random.Random(0)
    with (
        mock.patch.object(DecodeGraphs, "run", note),
        mock.patch.object(DecodeGraphs, "_forward", check),
        mock.patch.object(MixedGraphs, "takes", return_value=False),
    ):
        numbers: list[int] = []
        for _ in range(300):
            if len(numbers) < 12 and draw.random() < 0.3:
                numbers.append(engine.submit(request(text_of(draw.randint(1, 30)), draw.randint(1, 40))))
            if numbers and draw.random() < 0.4:
                number = draw.choice(numbers)
                draw.choice((engine.pause, engine.resume, engine.resume, engine.cancel))(number)
            engine.step()
            numbers = [number for number in numbers if number in engine._documents]
    assert len(seen) > 3 and engine.metrics.cancelled and engine.metrics.finished and engine.metrics.preempted


def test_documents_that_move_up_keep_their_own_pages() -> None:
    model = served_model("softmax")
    texts = [text_of(9, seed) for seed in range(3)]
    made = Engine(model, options=PADDED).generate([request(text, 2 + 6 * n) for n, text in enumerate(texts)])
    for n, (text, one) in enumerate(zip(texts, made, strict=True)):
        assert one.tokens == greedy(model, text, 2 + 6 * n)

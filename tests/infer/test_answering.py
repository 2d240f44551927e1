"""Answers of the engine to evaluations: scores against whole forward passes, what is read once, continuations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdata.tokenizer import ByteTokenizer
from mmtrain.build import build_model
from mmtrain.errors import ConfigError
from mmtrain.infer.answering import EngineAnswerer, open_answerer, options_for
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing
from tests.infer.chain import CONFIG, EOD, TEXT, chain_model
from tests.infer.served import assert_nothing_held

TOKENIZER = ByteTokenizer()
SIZES = replace(options_for(2000), prefill_tokens=128, memory_bytes=1 << 24)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    torch.manual_seed(0)
    return build_model(CONFIG).eval()


def answerer_of(model: HybridLM, sizes: EngineOptions = SIZES) -> tuple[EngineAnswerer, Engine]:
    engine = Engine(model, TOKENIZER, sizes)
    return EngineAnswerer(engine), engine


def whole(model: HybridLM, row: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one forward pass over a row, as in training: log-probabilities from a place on, and whether they are best."""
    tokens_T = torch.from_numpy(row)
    with torch.no_grad():
        logits_TV = model(tokens_T, Packing.from_lengths([len(row)], tokens_T.device)).double()
    logits_NV, labels_N = logits_TV[start - 1 : -1], tokens_T[start:]
    found = logits_NV.log_softmax(-1)[torch.arange(len(labels_N)), labels_N].numpy()
    return found, (logits_NV.argmax(-1) == labels_N).numpy()


def rows(*lengths: int, shared: int = 0, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    begin = rng.integers(0, 256, shared)
    return [np.concatenate([begin, rng.integers(0, 256, length)]) for length in lengths]


@pytest.mark.parametrize("shared", [0, 1, 40, 700])
@pytest.mark.parametrize("from_start", [False, True])
def test_rows_get_the_scores_of_a_whole_pass(model: HybridLM, shared: int, from_start: bool) -> None:
    asked = rows(2, 9, 4, shared=shared)
    starts = [1 if from_start else max(shared, 1)] * 3
    answerer, engine = answerer_of(model)
    for row, start, found in zip(asked, starts, answerer.score(asked, starts), strict=True):
        log_probs_N, likeliest_N = whole(model, row, start)
        assert found.log_probs_N.dtype == np.float32 and found.likeliest_N.dtype == bool
        assert found.log_probs_N == pytest.approx(log_probs_N, abs=1e-5)
        assert (found.likeliest_N == likeliest_N).all()
    assert_nothing_held(engine)


def test_the_likeliest_tokens_are_known(model: HybridLM) -> None:
    chain = chain_model(certainty=3.0)
    answerer, _ = answerer_of(chain)
    right, wrong = np.array(list(TEXT.encode())), np.array(list(TEXT.encode()))
    wrong[4] = 7
    one, other = answerer.score([right, wrong], [1, 2])
    assert one.likeliest_N.all() and other.likeliest_N.sum() == len(wrong) - 2 - 2  # itself, and what follows it


@pytest.mark.parametrize("context", [60, 600])  # of one step, and of several
def test_a_context_is_read_once_for_all_that_follow_it(model: HybridLM, context: int) -> None:
    answerer, engine = answerer_of(model)
    asked = [*rows(3, 5, 4, shared=context), *rows(6, 2, shared=context, seed=2)]
    found = answerer.score(asked, [context] * 5)
    read = engine.metrics.prefill_tokens + engine.metrics.decode_tokens
    assert read == 2 * (context - 1) + sum(len(row) - (context - 1) for row in asked)
    assert engine.metrics.prefix_hits == 3
    for row, score in zip(asked, found, strict=True):
        assert score.log_probs_N == pytest.approx(whole(model, row, context)[0], abs=1e-5)


def test_more_contexts_than_are_kept_are_read_once_too(model: HybridLM) -> None:
    answerer, engine = answerer_of(model, replace(SIZES, max_running=2, prefix_slots=2))
    asked = [row for seed in range(5) for row in rows(3, 4, shared=50, seed=seed)]
    asked = asked[::2] + asked[1::2]  # texts of a context do not follow each other
    found = answerer.score(asked, [50] * 10)
    assert engine.metrics.prefix_hits == 5 and answerer.score([], []) == []
    for row, score in zip(asked, found, strict=True):
        assert score.log_probs_N == pytest.approx(whole(model, row, 50)[0], abs=1e-5)


def test_a_book_before_all_prompts_is_read_once_for_these_and_the_next(model: HybridLM) -> None:
    answerer, engine = answerer_of(model)
    asked = rows(*range(20, 26), shared=600)
    plain = [answerer_of(model)[0].generate([row], [3])[0] for row in asked]
    assert answerer.generate(asked[:3], [3] * 3) + answerer.generate(asked[3:], [3] * 3) == plain
    metrics = engine.metrics
    made = sum(map(len, plain))
    read = metrics.prefill_tokens + metrics.decode_tokens - made + len(asked)  # the last token made is not read
    assert read == 577 + 1 + sum(len(row) - 576 for row in asked)  # 576: a multiple of 64, and a token beside it
    assert metrics.prefix_hits == 7


def test_a_prompt_alone_or_others_that_differ_early_keep_nothing(model: HybridLM) -> None:
    answerer, engine = answerer_of(model)
    answerer.generate(rows(300), [2])
    answerer.generate(rows(300, 310, shared=200), [2, 2])
    assert engine.metrics.prefix_hits == 0 and len(engine.memory.kept) == engine.plan.kept


def test_prompts_are_continued_to_the_end_of_the_document_or_their_own_room(run: Path) -> None:
    found, tokenizer = open_answerer(run, "cpu")
    prompts = [np.array(list(b"n")), np.array(list("né€".encode()))]
    made = found.generate(prompts, [50, 50])
    assert [tokenizer.decode(ids) for ids in made] == [TEXT[1:], TEXT[3:]]
    assert all(EOD not in ids for ids in made) and [len(ids) for ids in found.generate(prompts, [3, 2])] == [3, 2]


def test_no_layer_sees_more_than_a_step_s_tokens(model: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = model.embed_tokens.forward
    monkeypatch.setattr(model.embed_tokens, "forward", lambda ids: (seen.append(len(ids)), forward(ids))[1])
    answerer_of(model)[0].score(rows(1500), [1])
    assert max(seen) == SIZES.prefill_tokens and sum(seen) == 1500


def test_sizes_are_planned_by_the_longest_sample_and_one_that_does_not_fit_is_refused(model: HybridLM) -> None:
    plenty, engine = answerer_of(model, replace(options_for(1000, at_once=2), memory_bytes=1 << 24))
    plenty.check(1000)
    assert engine.plan.running == 2 and engine.plan.kept == 3 and engine.plan.pages == (16 + 1) * (2 + 3)
    little, engine = answerer_of(model, replace(options_for(10_000), memory_bytes=1 << 19))
    with pytest.raises(ConfigError, match=r"--lengths=10,000 tokens: the longest sample; [0-9,]+ fit into the memory"):
        little.check(10_000)
    assert engine.plan.longest is not None and little.check(engine.plan.longest) is None


def test_logits_that_are_no_numbers_and_full_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = chain_model()
    broken.lm_head.weight.data[3, 5] = float("nan")
    for ask in (lambda one: one.score(rows(5), [1]), lambda one: one.generate(rows(5), [3])):
        with pytest.raises(ConfigError, match="not finite"):
            ask(answerer_of(broken)[0])
    model = chain_model()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(model.embed_tokens, "forward", fail)
    told = "--prefill-tokens=a step of 5 tokens: does not fit into the memory of cpu, with samples of 5 tokens at work"
    with pytest.raises(ConfigError, match=told):
        answerer_of(model)[0].score(rows(5), [1])
    with pytest.raises(ConfigError, match=told):
        answerer_of(model)[0].generate(rows(5), [2])

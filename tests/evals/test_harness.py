"""The lm-evaluation-harness on a model of ours: its calls, with a stand-in of its base and the real package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmtrain.errors import ConfigError
from mmtrain.evals import harness
from mmtrain.evals.files.choices import choice_rows, score_choices
from mmtrain.evals.files.read_choices import read_choices
from mmtrain.evals.harness import HarnessCalls, harness_lm
from tests.evals.answerers import Bigrams
from tests.evals.text import TOKENIZER


def asked(*arguments: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture
def calls() -> HarnessCalls:
    return HarnessCalls(Bigrams(), TOKENIZER)


def test_log_likelihoods_are_sums_over_the_continuation(calls: HarnessCalls) -> None:
    table = Bigrams().log_probs_VV
    found = calls.loglikelihood(asked(("ab", " c"), ("ab", " cd"), ("", "x"), ("ab ", "c")))
    sums = [table[98, 32] + table[32, 99], table[98, 32] + table[32, 99] + table[99, 100], table[256, 120]]
    assert [nats for nats, _ in found] == pytest.approx([*sums, sums[0]], rel=1e-5)


def test_greedy_continuations_are_told_from_others() -> None:
    model = Bigrams()
    (greedy,) = model.generate([np.array([97])], [3])
    other = [greedy[0], (greedy[1] + 1) % 256]
    continuations = [bytes(ids).decode("latin1") for ids in (greedy[:2], other)]

    class Latin:
        vocab_size, eod_id = 257, 256
        encode = staticmethod(lambda text: list(text.encode("latin1")))

    made = HarnessCalls(model, Latin())
    assert [same for _, same in made.loglikelihood(asked(*(("a", text) for text in continuations)))] == [True, False]


def test_requests_are_handed_over_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(Bigrams):
        def score(self, rows: Any, starts: Any) -> list[Any]:
            sizes.append(len(rows))
            return super().score(rows, starts)

        def generate(self, prompts: Any, max_tokens: Any) -> list[list[int]]:
            sizes.append(len(prompts))
            return super().generate(prompts, max_tokens)

    monkeypatch.setattr(harness, "AT_ONCE", 3)
    texts = [chr(97 + i) for i in range(5)]
    calls = HarnessCalls(Counting(), TOKENIZER)
    table = Bigrams().log_probs_VV
    found = calls.loglikelihood(asked(*(("x", text) for text in texts)))
    assert [nats for nats, _ in found] == pytest.approx([table[120, ord(text)] for text in texts], rel=1e-5)
    assert len(calls.generate_until(asked(*((text, {"max_gen_toks": 2}) for text in texts)))) == 5
    assert sizes == [3, 2, 3, 2]


def test_whole_texts_begin_after_the_end_of_another(calls: HarnessCalls) -> None:
    table = Bigrams().log_probs_VV
    found = calls.loglikelihood_rolling(asked(("abc",), ("",)))
    assert found == pytest.approx([table[256, 97] + table[97, 98] + table[98, 99], 0.0], rel=1e-5)


def test_continuations_end_before_a_stop_text(calls: HarnessCalls) -> None:
    class Says:
        def generate(self, prompts: Any, max_tokens: list[int]) -> list[list[int]]:
            return [list(b" one\nQ: two. three"[:most]) for most in max_tokens]

    made = HarnessCalls(Says(), TOKENIZER)  # type: ignore[arg-type]
    options = ({"until": ["\n\n", ". ", "\nQ:"]}, {"until": ". "}, {"max_gen_toks": 4}, {"until": None})
    found = made.generate_until(asked(*(("p", one) for one in options)))
    assert found == [" one", " one\nQ: two", " one", " one\nQ: two. three"]
    with pytest.raises(ConfigError, match="do_sample=true"):
        made.generate_until(asked(("p", {"do_sample": True, "temperature": 0.7})))
    assert made.generate_until(asked(("p", {"do_sample": True, "temperature": 0, "max_gen_toks": 2}))) == [" o"]


def test_requests_that_are_too_long_are_refused_not_cut() -> None:
    calls = HarnessCalls(Bigrams(), TOKENIZER, max_length=5)
    assert len(calls.loglikelihood(asked(("abc", "de")))) == 1
    for ask, arguments in (
        (calls.loglikelihood, ("abc", "def")),
        (calls.loglikelihood_rolling, ("abcde",)),
        (calls.generate_until, ("abc", {"max_gen_toks": 3})),
    ):
        with pytest.raises(ConfigError, match="a request has 6 tokens, and none is cut"):
            ask(asked(arguments))
    with pytest.raises(ConfigError, match="nothing follows it"):
        calls.loglikelihood(asked(("abc", "")))


def test_without_the_package_one_line_says_so_and_with_it_its_base_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install lm_eval"):
        harness_lm(Bigrams(), TOKENIZER)

    class Base:
        def __init__(self) -> None:
            self.begun = True

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        module = ModuleType(name)
        module.LM = Base  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    made = harness_lm(Bigrams(), TOKENIZER)
    assert isinstance(made, Base) and made.begun and len(made.loglikelihood(asked(("a", "b")))) == 1


def test_the_real_harness_gets_the_same_figures_from_a_file_of_choices(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    rng = np.random.default_rng(2)
    path = tmp_path / "q.jsonl"
    lines = ({"question": f"q{i}?", "choices": ["c" * int(rng.integers(1, 9)) + str(j) for j in range(3)],
              "answer": int(rng.integers(3))} for i in range(30))  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_target": "answer", "doc_to_choice": "choices", "num_fewshot": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    model = Bigrams()
    made = lm_eval.simple_evaluate(harness_lm(model, TOKENIZER), tasks=[task], bootstrap_iters=0)["results"]["mine"]
    scores = []
    for question in read_choices(path, "--choices-file"):
        rows, counts = zip(*choice_rows(TOKENIZER, question), strict=True)
        found = model.score(rows, [len(row) - count for row, count in zip(rows, counts, strict=True)])
        nats = [one.log_probs_N.sum() for one in found]
        scores.append(score_choices(np.array(nats), question.choices, question.answer))
    assert made["acc,none"] == pytest.approx(np.mean([score.acc for score in scores]))
    assert made["acc_norm,none"] == pytest.approx(np.mean([score.acc_norm for score in scores]))
    assert 0 < made["acc,none"] < 1

"""The lm-evaluation-harness over HTTP (its `local-completions`) beside the same harness on the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmtrain.evals.harness import harness_lm
from mmtrain.infer.answering import EngineAnswerer, options_for
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.model import HybridLM
from tests.infer.chain import file_tokenizer
from tests.infer.endpoint.running import Running, running
from tests.model.small import small_model

MODEL = dict(vocab_size=257, num_layers=3, layer_pattern="LLS", hidden_size=32)
OPTIONS = EngineOptions(max_running=16, page_tokens=16, prefix_slots=2, memory_bytes=1 << 22)


def answerer_of(model: HybridLM, tokenizer: Tokenizer) -> EngineAnswerer:
    """What answers without a server."""
    return EngineAnswerer(Engine(model, tokenizer, options_for(None)))


def likelihoods(server: Running, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Sum and greediness of continuations, taken out of an answer as the harness does (lm_eval 0.4.13)."""
    body = dict(model="tiny", prompt=[[*before, *after] for before, after in pairs], temperature=0, max_tokens=1,
                logprobs=1, seed=1234, echo=True)  # fmt: skip
    found = []
    for choice, (before, _) in zip(server.complete(**body)["choices"], pairs, strict=True):
        told = choice["logprobs"]
        own = told["token_logprobs"][len(before) : -1]
        best = [max(one.values()) for one in told["top_logprobs"][len(before) : -1]]
        found.append((sum(own), own == best))
    return found


def test_likelihoods_are_the_model_s_and_greedy_ones_are_known(server: Running) -> None:
    answerer = answerer_of(small_model(**{**MODEL, "vocab_size": 264}), load_tokenizer("bytes"))
    context = list(b"The end of it")
    (greedy,) = answerer.generate([np.array(context)], [5])
    other = [*greedy[:2], (greedy[2] + 1) % 256]
    pairs = [(context, greedy), (context, other), (context[:1], [*context[1:], 256]), ([256], greedy[:1])]
    rows = [np.array([*before, *after]) for before, after in pairs]
    expected = [float(row.log_probs_N.sum()) for row in answerer.score(rows, [len(before) for before, _ in pairs])]
    found = likelihoods(server, pairs)
    assert [nats for nats, _ in found] == pytest.approx(expected, abs=1e-4)
    assert [same for _, same in found[:2]] == [True, False]


@pytest.mark.slow  # two minutes, most of them imports
def test_the_real_harness_gets_the_same_figures_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="lm_eval's API models are its extra `api`")
    pytest.importorskip("aiohttp", reason="lm_eval's API models are its extra `api`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = np.random.default_rng(2)
    lines = []
    for i in range(12):
        choices = [" " + "c" * int(rng.integers(1, 9)) + str(j) for j in range(3)]
        lines.append({"question": f"What is {i} and é?", "choices": choices, "answer": int(rng.integers(3))})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = file_tokenizer(tmp_path / "tokenizer")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end_of_document>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
              "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0}  # fmt: skip
    chosen = {**common, "task": "mine", "output_type": "multiple_choice", "doc_to_target": "answer",
               "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    written = {**common, "task": "written", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
               "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
               "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    tokenizer, model = load_tokenizer(folder), small_model(**MODEL)
    tasks: list[Any] = [chosen, written]

    def samples(lm: Any) -> list[Any]:
        made = lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
        rows = [sorted(made["samples"][name], key=lambda one: one["doc_id"]) for name in ("mine", "written")]
        return [made["results"]["mine"]["acc,none"], made["results"]["mine"]["acc_norm,none"],
                [one["filtered_resps"] for one in rows[0]], [one["filtered_resps"] for one in rows[1]]]  # fmt: skip

    with running(model, OPTIONS, tokenizer) as server:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        url = f"http://127.0.0.1:{server.port}/v1/completions"
        there = samples(LocalCompletionsAPI(url, "huggingface", model="tiny", tokenizer=str(folder), batch_size=5))
    here = samples(harness_lm(answerer_of(small_model(**MODEL), tokenizer), tokenizer))
    assert there[:2] == here[:2] and there[3] == here[3]
    for over_http, directly in zip(there[2], here[2], strict=True):
        assert [one[0] for one in over_http] == pytest.approx([one[0] for one in directly], abs=1e-3)
        assert [one[1] for one in over_http] == [one[1] for one in directly]

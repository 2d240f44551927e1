"""The inference bench's arithmetic and passes, on a CPU with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmtrain.bench.infer.cases import CASES, Decode, Mixed, Peer, Prefill, Shares
from mmtrain.bench.infer.decode import at_work, decode, floor_bytes
from mmtrain.bench.infer.mixed import mixed
from mmtrain.bench.infer.models import ServedModel, model_config, read_bytes, served
from mmtrain.bench.infer.peer import peer
from mmtrain.bench.infer.prefill import StepMemory, prefill, prefill_flops, step_memory_planned
from mmtrain.bench.infer.report import table, with_predictions
from mmtrain.bench.infer.shares import cut_down, shares, shares_of
from mmtrain.bench.infer_gpu import main
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.flops import step_flops
from tests.infer.served import SMALL
from tests.model.small import small_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> ServedModel:
    return served(small_config(num_layers=4, layer_pattern="LLLS"), "fp32", CPU)


def nothing() -> None:
    """What waits for a device."""


@pytest.mark.parametrize("graphs", [None, True])
def test_decode(small: ServedModel, graphs: bool | None) -> None:
    found = decode(Decode("small", documents=3, context=40, graphs=graphs), small, 1e12, 2, nothing)
    assert found["of_floor"] == pytest.approx(found["floor_ms"] / found["step_ms"])
    assert found["weights_of_plan"] == 1


@pytest.mark.parametrize("precision", ["int8", "int8-g128"])
def test_int8_weights_take_what_is_planned(precision: str, small: ServedModel) -> None:
    found = served(small.model.config, precision, CPU)
    assert found.weights == found.planned < small.weights
    assert read_bytes(found.model) == found.weights - found.model.embed_tokens.weight.nbytes


def test_documents_are_at_work(small: ServedModel) -> None:
    engine = Engine(small.model, options=SMALL)
    documents = at_work(engine, 2, 9)
    assert [(one.computed, len(one.tokens), len(one.pages)) for one in documents] == [(9, 10, 19)] * 2
    assert documents[0].slot != documents[1].slot and not set(documents[0].pages) & set(documents[1].pages)
    assert engine.unfinished == 2 and len(engine.step()) == 2


def test_floor(small: ServedModel) -> None:
    engine, config = Engine(small.model, options=SMALL), small.model.config
    weights = sum(p.numel() for n, p in small.model.named_parameters() if n != "embed_tokens.weight")
    state = 3 * config.num_heads * config.head_dim**2
    keys = 10 * 2 * config.num_kv_heads * config.head_dim
    assert floor_bytes(engine, small.model, 2, 10) == 4 * (weights + 2 * (2 * state + keys))


def test_prefill(small: ServedModel) -> None:
    found = prefill(Prefill("small", tokens=50, piece=16), small, nothing)
    assert found["tokens_s"] > 0 and found["forward_tokens_s"] > 0
    config = small.model.config
    head = 2 * config.hidden_size * config.vocab_size
    assert prefill_flops(config, 50) == pytest.approx(step_flops(config, [50]).forward - 49 * head)


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held before does not count; the plan has a copy of a layer's keys, which longer prompts make larger."""
    held = iter([700])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    found = StepMemory(torch.device("cuda")).of_plan(400)
    assert found == {"step_bytes": 300, "step_bytes_planned": 400, "step_of_plan": 0.75}
    assert StepMemory(CPU).of_plan(400) == {}
    config, options = small_config(num_layers=4, layer_pattern="LLLS"), EngineOptions(max_running=1, prefix_slots=0)
    planned = [step_memory_planned(config, Prefill("small", tokens=64 * pages - 1), options) for pages in (1, 3)]
    keys = 2 * config.num_kv_heads * config.head_dim * 2
    assert planned[1] - planned[0] == 2 * 64 * keys


def test_a_long_prefill_tells_how_far_it_is(small: ServedModel) -> None:
    lines: list[str] = []
    found = prefill(Prefill("small", tokens=64, piece=16, once=True), small, nothing, lines.append)
    tokens, seconds = zip(*found["marks"], strict=True)
    assert tokens == (16, 32, 48, 64) and list(seconds) == sorted(seconds) and seconds[-1] == found["seconds"]
    assert len(lines) == 3 and "forward_tokens_s" not in found


def test_shares() -> None:
    model = served(cut_down(small_config()), "fp32", CPU)
    found = shares(Shares("small", points=(16, 48), piece=16), model, nothing)
    assert [point["tokens"] for point in found["points"]] == [16, 48]
    for point in found["points"]:
        for kind in ("softmax", "lightning"):
            one = point[kind]
            assert 0 < one["core_ms"] < one["mixer_ms"] < one["layer_ms"] and one["ffn_ms"] < one["layer_ms"]
    first, last = found["points"]
    assert first["softmax"]["layer_ms"] < last["softmax"]["layer_ms"]
    assert not model.model.layers[0].mixer._forward_hooks


def test_arithmetic_of_shares() -> None:
    sums = {("softmax", "core"): 6.0, ("softmax", "mixer"): 8.0, ("softmax", "ffn"): 2.0, ("softmax", "layer"): 11.0,
            ("lightning", "core"): 1.0, ("lightning", "mixer"): 3.0, ("lightning", "ffn"): 2.0,
            ("lightning", "layer"): 7.0}  # fmt: skip
    found = shares_of(sums)
    assert (found["softmax"]["share"], found["softmax"]["core_share"]) == (0.8, 0.6)
    assert found["lightning"]["share"] == 0.6
    assert found["hybrid"] == {"softmax_core_share": 6 / 60, "lightning_core_share": 7 / 60}


def test_mixed(small: ServedModel) -> None:
    found = mixed(Mixed("small", decodes=3, prompts=2, tokens=5, padded=16), small, 2, nothing)
    assert found["projection_rows"] == [3, 10]
    assert found["core_of_padded"] == found["core_ms"] / found["padded_core_ms"]


def test_peer() -> None:
    pytest.importorskip("transformers")
    config = small_config(num_layers=2, layer_pattern="LS", num_experts=0)
    found = peer(Peer("small", "fp32", context=20), config, CPU, 2, nothing)
    assert found["step_ms"] > 0 and found["prefill_tokens_s"] > 0


ROWS = [
    {"case": name, "model": "m", "precision": "bf16", "documents": 1, "context": context, "step_ms": step,
     "floor_ms": floor, "graphs": None}
    for name, context, step, floor in (("long", 1000, 4.2, 2.5), ("short", 10, 3.0, 1.5))
]  # fmt: skip


def test_prediction_is_the_shortest_and_the_further_bytes() -> None:
    long, short = with_predictions(ROWS)
    assert (long["predicted_ms"], long["of_predicted"]) == (4.0, 1.05)
    assert "predicted_ms" not in short
    assert "| long | 4.20 | 1.050 |" in table([long, short])


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = shares_of(
        {(kind, part): 1.0 for kind in ("softmax", "lightning") for part in ("core", "mixer", "ffn", "layer")}
    )
    rows = [*ROWS, {"case": "share", "points": [{"tokens": 10, **point}]}, {"case": "bad", "error": "why"}]
    (tmp_path / "infer.json").write_text(json.dumps({"rows": rows}))
    main(["--out", str(tmp_path), "--draw"])
    assert (tmp_path / "infer.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| 10 | 50.0% (50.0%) | 50.0% (50.0%) | 12.5% | 87.5% |" in printed and "bad: error: why" in printed


def test_cases() -> None:
    for case in CASES.values():
        assert model_config(case.model).num_layers > 0
        if isinstance(case, Shares):
            assert list(case.points) == sorted(case.points) and not any(point % case.piece for point in case.points)
    with pytest.raises(ConfigError, match="is no case"):
        main(["--out", "nowhere", "--only", "no"])
    with pytest.raises(ConfigError, match=r"has no infer\.json"):
        main(["--out", "nowhere", "--draw"])

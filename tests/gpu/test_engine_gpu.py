"""The engine on a GPU, with its two streams, against the whole forward pass on the CPU in fp32."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mmtrain.infer.compute_dtype import cast_for_compute
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.mixed_graphs import MixedGraphs
from mmtrain.infer.serving.options import EngineOptions
from tests.infer.served import assert_nothing_held, full_logits, request, seen_logits, text_of
from tests.model.small import relative, small_model

pytestmark = pytest.mark.gpu
LENGTHS, NEW = (300, 1, 77, 640, 12), 8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("prefill_tokens", [64, 4096])
def test_logits_are_those_of_the_whole_forward_pass(dtype: torch.dtype, bound: float, prefill_tokens: int) -> None:
    exact = small_model(num_layers=4, layer_pattern="LLLS", hidden_size=128, head_dim=32).eval()
    model = copy.deepcopy(exact).to("cuda")
    cast_for_compute(model, dtype)
    options = EngineOptions(max_running=4, page_tokens=16, prefill_tokens=prefill_tokens, prefix_slots=2,
                            prefix_interval=128, memory_bytes=1 << 26)  # fmt: skip
    engine = Engine(model, options=options)
    for _ in range(2):  # the second time with prefixes
        with seen_logits() as seen:
            engine.generate([request(text_of(length), NEW) for length in LENGTHS])
        assert len(seen) == len(LENGTHS) * NEW
        for tokens, logits_V in seen.items():
            assert relative(logits_V.cpu(), full_logits(exact, tokens)[-1]) < bound
    assert engine.metrics.prefix_hits > 0
    assert_nothing_held(engine)


def assert_alike(seen: list[dict[tuple[int, ...], torch.Tensor]], experts: int) -> None:
    """Two engines' logits of the same texts differ by rounding; it turns a router's choice here and there."""
    assert seen[0].keys() == seen[1].keys()
    errors = [relative(seen[1][tokens], seen[0][tokens]) for tokens in seen[0]]
    assert sum(error >= 3e-2 for error in errors) <= (len(errors) // 20 if experts else 0), max(errors)


@pytest.mark.parametrize("layer_pattern", ["LLLS", "S"])
@pytest.mark.parametrize("experts", [0, 4])
def test_graphs_of_decode_steps_give_the_same_logits(layer_pattern: str, experts: int) -> None:
    model = small_model(num_layers=4, layer_pattern=layer_pattern, hidden_size=128, head_dim=32, num_experts=experts)
    model = model.eval().to("cuda")
    cast_for_compute(model, torch.bfloat16)
    options = EngineOptions(max_running=9, page_tokens=16, prefix_slots=0, memory_bytes=1 << 27)
    seen = []
    for graphs in (False, True):
        engine = Engine(model, options=replace(options, cuda_graphs=graphs))
        with seen_logits(forced=True) as logits:
            engine.generate([request(text_of(length), 20 + length) for length in (3, 80, 1, 7, 1030)])
        seen.append(logits)
        assert_nothing_held(engine)
    assert_alike(seen, experts)


@pytest.mark.parametrize("layer_pattern", ["LLLS", "S", "L"])
@pytest.mark.parametrize("experts", [0, 4])
def test_prompts_that_join_decode_steps_in_one_graph(layer_pattern: str, experts: int) -> None:
    exact = small_model(num_layers=4, layer_pattern=layer_pattern, hidden_size=128, head_dim=32, num_experts=experts)
    model = copy.deepcopy(exact.eval()).to("cuda")
    cast_for_compute(model, torch.bfloat16)
    options = EngineOptions(max_running=9, page_tokens=16, prefill_tokens=100, prefix_slots=0, memory_bytes=1 << 27)
    seen = []
    for graphs in (False, True):
        engine = Engine(model, options=replace(options, cuda_graphs=graphs))
        with seen_logits(forced=True) as logits, mock.patch.object(MixedGraphs, "run", autospec=True,
                                                        side_effect=MixedGraphs.run) as run:  # fmt: skip
            for length in (40, 3, 200, 77, 1, 30, 150):
                engine.submit(request(text_of(length), 20))
                engine.step()
            while engine.at_work:
                engine.step()
        seen.append(logits)
        assert (len(run.call_args_list) > 5) == graphs
        assert_nothing_held(engine)
    assert_alike(seen, experts)


def test_memory_is_planned_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(num_layers=4, layer_pattern="LLLS").to("cuda")
    free, total = 20 << 30, torch.cuda.mem_get_info()[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, total))  # others come and go
    engine = Engine(model, options=EngineOptions(memory_share=0.1))
    assert 0 < engine.plan.bytes <= 0.1 * free + torch.cuda.memory_reserved()
    assert engine.plan.running == 64 and engine.plan.pages > 1000

"""What is planned before the first step: the shapes that this rank's attention will have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.build import meta_model
from mmtrain.parallel.layout import Layout
from mmtrain.train import warmup as warm
from tests.model.small import small_config

CPU = torch.device("cpu")


def context(tp: int = 1, cp: int = 1) -> SimpleNamespace:
    return SimpleNamespace(layout=Layout(pp=1, dp=1, cp=cp, tp=tp, edp=tp * cp, ep=1, etp=1), device=CPU)


def plan(
    monkeypatch: pytest.MonkeyPatch, pattern: str, tp: int = 1, recompute: bool = False, cp: int = 1, rows: int = 1
) -> tuple[list, Any]:
    """Arguments of every call for plans, and what was said."""
    calls: list[Any] = []
    monkeypatch.setattr(warm, "build_plans", lambda *args, **options: calls.append((*args, options)) or [9, 8, 7])
    model = meta_model(small_config(num_heads=4, num_kv_heads=2, layer_pattern=pattern))
    return calls, warm.AttentionPlans().build(model, context(tp, cp), torch.bfloat16, 8192, recompute, rows)


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(1, 4, 2), (2, 2, 1), (4, 1, 1)])
def test_a_rank_plans_for_its_heads(tp: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = plan(monkeypatch, "LLLS", tp, recompute=tp == 2)
    (found,) = calls
    assert found[:2] == (heads, kv_heads) and found[3:6] == (torch.bfloat16, CPU, 8192)
    assert found[6]["recompute"] is (tp == 2)
    assert "3 lengths" in said


def test_a_rank_plans_for_the_part_of_a_document_that_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    ((*_, longest, _),), _ = plan(monkeypatch, "LLLS", cp=4)
    assert longest == 8192 // 4
    for rows, expected in ((2, 8192 // 2), (8, 8192)):  # of a row that fits a rank's share of the micro-batch, all
        ((*_, longest, _),), _ = plan(monkeypatch, "LLLS", cp=4, rows=rows)
        assert longest == expected


def test_a_stage_without_softmax_attention_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, "LLLL") == ([], None)


def test_on_a_cpu_there_is_nothing_to_plan() -> None:
    assert (
        warm.AttentionPlans().build(meta_model(small_config()), context(), torch.bfloat16, 8192, recompute=False)
        is None
    )


def test_what_this_process_has_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another layout, but for other heads, or with recomputation, whose graphs are in another thread."""
    calls: list[set[int]] = []

    def build(*args: Any, known: set[int], recompute: bool) -> list[int]:
        calls.append(set(known))
        return [n for n in (300, 200, 100) if n <= args[5] and n not in known]

    monkeypatch.setattr(warm, "build_plans", build)
    plans, model = warm.AttentionPlans(), meta_model(small_config(num_heads=4, num_kv_heads=2, layer_pattern="S"))

    def said(seq_len: int, recompute: bool, tp: int = 1) -> str | None:
        return plans.build(model, context(tp), torch.bfloat16, seq_len, recompute)

    assert "2 lengths" in said(200, False) and "1 lengths" in said(300, False) and said(300, False) is None
    assert "3 lengths" in said(300, True) and said(300, True) is None and "3 lengths" in said(300, True, tp=2)
    assert said(300, False, tp=2) is None  # recomputation has those of a forward pass alone too
    assert calls[1] == {100, 200} and calls[3] == set()

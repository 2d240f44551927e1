"""Documents read past their end give what documents by themselves give."""

from __future__ import annotations

import pytest
import torch

from mmkernels.softmax import build_plans, dispatch, eager, packed, softmax_attention
from mmkernels.softmax.backends import cudnn_buckets, cudnn_plans


def test_buckets_hold_the_length_and_are_few() -> None:
    lengths = range(1, 70_000)
    found = {cudnn_buckets.bucket(n) for n in lengths}
    assert all(n <= cudnn_buckets.bucket(n) <= max(n + 63, n * (1 + 1 / cudnn_buckets.STEPS) + 1) for n in lengths)
    assert len(found) < 260 and {cudnn_buckets.bucket(b) for b in found} == found


@pytest.mark.parametrize("lengths", [[70, 3, 100], [100], [64, 128], [1, 200, 1]])
def test_padded_documents_change_nothing(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(sum(lengths), h, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2, 4))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    seen, results = [], []
    monkeypatch.setattr(dispatch, "block_for", lambda q, k: eager)
    plain = eager.forward
    monkeypatch.setattr(eager, "forward", lambda q, *rest: seen.append(q.shape[0]) or plain(q, *rest))
    for stand_in in (None, eager):  # the second time, the plain block counts as cuDNN's
        monkeypatch.setattr(packed, "cudnn", stand_in)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = softmax_attention(*leaves, cu_seqlens, lengths)
        o.backward(do)
        results.append([o.detach(), *(x.grad for x in leaves)])
    assert seen == lengths + [cudnn_buckets.bucket(n) for n in lengths]
    for alone, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("longest", [1, 2047, 2048, 2049, 8192, 40_000])
def test_every_long_document_up_to_the_longest_has_its_plan(longest: int) -> None:
    planned = cudnn_plans.lengths_to_plan(longest)
    longest = min(longest, cudnn_plans.LONGEST)
    assert set(planned) == {cudnn_buckets.bucket(n) for n in range(1, longest + 1) if n >= dispatch.LONG}
    assert planned == sorted(planned, reverse=True)  # memory of the first serves all


@pytest.mark.parametrize("recompute", [False, True])
def test_plans_are_built_by_running_each_length_both_ways(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"forward": [], "backward": []}
    for name, calls in seen.items():
        run = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, run=run, calls=calls: calls.append(a[0].shape[0]) or run(*a))
    for name, value in {"cudnn_fits": lambda q: True, "block_for": lambda q, k: eager, "LONG": 100}.items():
        monkeypatch.setattr(dispatch, name, value)
    monkeypatch.setattr(dispatch, "_least_for_block", lambda *_: dispatch.LONG)
    given = (4, 2, 8, torch.float32, torch.device("cpu"), 200)
    assert build_plans(*given, recompute=recompute) == seen["backward"] == [256, 192, 128]
    assert seen["forward"] == [n for n in (256, 192, 128) for _ in range(1 + recompute)]
    assert build_plans(*given, recompute=recompute, known={256, 128}) == [192] == seen["backward"][3:]


def test_nothing_is_planned_where_cudnn_takes_nothing() -> None:
    assert build_plans(4, 2, 8, torch.float32, torch.device("cpu"), 8192) == []

"""Documents read past their end give what documents by themselves give."""

from __future__ import annotations

import pytest
import torch

from mmkernels.softmax import buckets, dispatch, eager, packed, softmax_attention


def test_buckets_hold_the_length_and_are_few() -> None:
    lengths = range(1, 70_000)
    found = {buckets.bucket(n) for n in lengths}
    assert all(n <= buckets.bucket(n) <= max(n + 63, n * (1 + 1 / buckets.STEPS) + 1) for n in lengths)
    assert len(found) < 260 and {buckets.bucket(b) for b in found} == found


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
    assert seen == lengths + [buckets.bucket(n) for n in lengths]
    for alone, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)

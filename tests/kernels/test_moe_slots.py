"""Capacity slots: rows of several senders sorted by expert, against plain loops; and the way of rows through them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe import (
    Route,
    permute,
    permute_grad,
    route,
    sort_received,
    take_rows,
    to_slots,
    unpermute,
    unpermute_grads,
)
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]


def draw_route(tokens: int, experts: int, top_k: int, capacity: int) -> Route:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(3))
    return route(logits.to(DEVICE), top_k, capacity, backend="naive")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [(40, 6, 2, 9, 0, 9), (40, 6, 2, 9, 4, 5), (40, 6, 2, 9, 0, 5), (7, 5, 3, 2, 1, 1),
                                  (1, 1, 1, 1, 0, 1), (700, 3, 2, 300, 150, 1100)], ids=str)  # fmt: skip
def test_assignments_get_the_slots_of_their_number(case: tuple[int, ...], backend: str) -> None:
    tokens, experts, top_k, capacity, first, slots = case
    plan = draw_route(tokens, experts, top_k, capacity)
    start = torch.randperm(experts, generator=torch.Generator().manual_seed(1)).int().to(DEVICE) * slots
    found = to_slots(plan, start, first, slots, backend=backend)
    want_row, want_token = torch.full_like(plan.row_TK, -1), torch.full((experts * slots,), -1)
    want_count = [0] * experts
    for e in range(experts):
        rows = plan.token_R[int(plan.offset_E[e] - plan.count_E[e]) : int(plan.offset_E[e])].tolist()
        for j, token in enumerate(rows[first : first + slots]):
            k = plan.expert_TK[token].tolist().index(e)
            want_row[token, k] = start[e] + j
            want_token[int(start[e]) + j] = token
            want_count[e] += 1
    assert torch.equal(found.row_TK, want_row)
    assert found.token_R.tolist() == want_token.tolist() and found.token_R.dtype == torch.int32
    assert found.count_E.tolist() == want_count
    assert found.offset_E.tolist() == torch.tensor(want_count).cumsum(0).tolist()


CUTS = {4: [[4], [1, 2, 1], [1, 1, 1, 1]], 1: [[1]], 5: [[2, 3]]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ranks", "slices", "local_experts", "capacity"), [(2, 1, 4, 3), (3, 2, 4, 5), (1, 2, 5, 1), (2, 2, 1, 1030)]
)
def test_received_rows_are_sorted_by_expert(
    ranks: int, slices: int, local_experts: int, capacity: int, backend: str
) -> None:
    count = torch.randint(
        0, capacity + 1, (slices, ranks, local_experts), generator=torch.Generator().manual_seed(7)
    ).int()
    count[0, 0, 0], count[-1, -1, -1] = 0, capacity
    for sizes in CUTS[local_experts]:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        cuts = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        lo = torch.tensor([part.start for part in cuts for _ in part]).int().to(DEVICE)
        hi = torch.tensor([part.stop for part in cuts for _ in part]).int().to(DEVICE)
        found = sort_received(count.to(DEVICE).transpose(0, 1), lo, hi, capacity, backend=backend)
        assert {x.dtype for x in found} == {torch.int32}
        for part in cuts:
            rows = [(p, w, e, j) for p in range(slices) for w in range(ranks) for e in part for j in range(capacity)]
            used = [i for i, (p, w, e, j) in enumerate(rows) if j < count[p, w, e]]
            used.sort(key=lambda i: (rows[i][2], rows[i][0], rows[i][1], rows[i][3]))
            target = [used.index(i) if i in set(used) else -1 for i in range(len(rows))] if len(rows) < 999 else None
            at = slice(slices * ranks * capacity * part.start, slices * ranks * capacity * part.stop)
            assert found.source_M[at].tolist() == used + [-1] * (len(rows) - len(used))
            assert target is None or found.target_M[at].tolist() == target
            sorted_rows = found.target_M[at][used].tolist()
            assert sorted_rows == list(range(len(used)))
            per_expert = count[:, :, part.start : part.stop].sum((0, 1)).cumsum(0)
            assert found.offset_L[part.start : part.stop].tolist() == per_expert.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_reach_their_slots_and_empty_ones_are_never_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)
    plan = draw_route(30, 4, 2, 12)
    start = torch.arange(4, device=DEVICE).int() * 12
    sent = to_slots(plan, start, 0, 12, backend=backend)
    x = torch.randn(30, 16, device=DEVICE).requires_grad_()
    weight = plan.weight_TK.detach().requires_grad_()
    rows = permute(x, sent, clear=False, backend=backend)
    used = sent.token_R >= 0
    assert torch.equal(rows[used], x[sent.token_R[used].long()])
    y = torch.where(used[:, None], rows.detach(), float("nan")).requires_grad_()
    out = unpermute(y, weight, sent, clear=False, backend=backend)
    want = unpermute(permute(x, plan, backend="naive"), weight, plan, backend="naive")
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(out)
    dy, dweight = torch.autograd.grad(out, (y, weight), upstream, retain_graph=True)
    want_dx, want_dweight = torch.autograd.grad(want, (x, weight), upstream)
    torch.testing.assert_close(dweight, want_dweight)
    (dx,) = torch.autograd.grad(rows, x, torch.where(used[:, None], dy, float("nan")))
    torch.testing.assert_close(dx, want_dx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_hand_and_memory_that_is_given(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd's, with rows in memory of the caller, whose unused ones stay as they were."""
    fill_new_memory(monkeypatch)
    plan = draw_route(30, 4, 2, 12)
    sent = to_slots(plan, torch.arange(4, device=DEVICE).int() * 12, 0, 12, backend=backend)
    used, weight = sent.token_R >= 0, plan.weight_TK.detach().requires_grad_()
    x = torch.randn(30, 16, device=DEVICE).requires_grad_()
    rows = permute(x, sent, clear=False, backend=backend)
    out = unpermute(rows, weight, sent, clear=False, backend=backend)
    do = torch.randn_like(out)
    want_dy, want_dx, want_dweight = torch.autograd.grad(out, (rows, x, weight), do)
    memory = torch.full((48, 16), 7.0, device=DEVICE)
    laid = permute(x, sent, clear=False, out=memory, backend=backend)
    assert laid.data_ptr() == memory.data_ptr() and not laid.requires_grad and torch.equal(laid[used], rows[used])
    assert backend == "naive" or (laid[~used] == 7).all()
    dy, dweight = unpermute_grads(do, rows.detach(), weight.detach(), sent, clear=False, out=memory, backend=backend)
    assert dy.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(dy[used], want_dy[used], rtol=0, atol=0)
    torch.testing.assert_close(dweight, want_dweight, rtol=0, atol=0)
    torch.testing.assert_close(permute_grad(dy, sent, backend=backend), want_dx, rtol=0, atol=0)
    fresh, _ = unpermute_grads(do, rows.detach(), weight.detach(), sent, clear=False, backend=backend)
    assert torch.equal(fresh[used], dy[used])
    taken = take_rows(rows.detach(), sent.token_R, clear=False, out=memory, backend=backend)
    assert taken.data_ptr() == memory.data_ptr()
    assert torch.equal(taken[used], rows.detach()[sent.token_R[used].long()])


@pytest.mark.parametrize("call", ["permute", "take_rows", "unpermute_grads"])
def test_memory_of_another_kind_is_refused(call: str) -> None:
    plan = draw_route(30, 4, 2, 12)
    x, rows = torch.randn(30, 16, device=DEVICE), torch.randn(plan.token_R.shape[0], 16, device=DEVICE)
    run = {
        "permute": partial(permute, x, plan),
        "take_rows": partial(take_rows, rows, plan.token_R),
        "unpermute_grads": partial(unpermute_grads, x, rows, plan.weight_TK, plan),
    }[call]
    for out in (rows[:-1], rows.bfloat16(), rows.t().contiguous().t(), rows.to("meta")):
        with pytest.raises(KernelArgumentError, match=r"^out: got .*; allowed: contiguous torch.float32"):
            run(out=out)


def test_gradients_of_another_shape_are_refused() -> None:
    plan = draw_route(30, 4, 2, 12)
    x, rows = torch.randn(30, 16, device=DEVICE), torch.randn(plan.token_R.shape[0], 16, device=DEVICE)
    with pytest.raises(KernelArgumentError, match=r"^do_TD: "):
        unpermute_grads(x[:, :8], rows, plan.weight_TK, plan)
    with pytest.raises(KernelArgumentError, match=r"^dy_RD: "):
        permute_grad(x[:-1], plan)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_take_rows(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)
    x = torch.randn(9, 37, device=DEVICE).to(dtype)
    index = torch.tensor([3, -1, 0, 8, 8, -1], dtype=torch.int32, device=DEVICE)
    found = take_rows(x, index, backend=backend)
    want = torch.stack([x[i] if i >= 0 else torch.zeros_like(x[0]) for i in index.tolist()])
    assert torch.equal(found, want)
    bare = take_rows(x, index, clear=False, backend=backend)
    assert torch.equal(bare[index >= 0], want[index >= 0])
    assert backend == "naive" or bare[index < 0].isnan().all()  # spared the writes
    assert take_rows(x[:0], index[:0], backend=backend).shape == (0, 37)
    assert torch.equal(take_rows(x[:0], index[1:2], backend=backend), torch.zeros_like(x[:1]))


def test_arguments_that_do_not_fit() -> None:
    plan = draw_route(5, 3, 2, 4)
    wrong: Tensor = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for call in (
        lambda: to_slots(plan, wrong, 0, 4),
        lambda: sort_received(wrong, wrong, wrong, 4),
        lambda: sort_received(wrong.view(1, 1, 2), wrong, wrong, 4, backend="cuda"),
        lambda: take_rows(torch.zeros(3, 4, device=DEVICE), wrong.long()),
    ):
        with pytest.raises(KernelArgumentError):
            call()

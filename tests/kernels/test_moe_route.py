"""Routing: kernels against the definition, the definition against a loop, both against megatron-core and autograd."""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.moe import DROP_POLICIES, Route, route
from mmkernels.moe.route.launch import TILES, Tiles, triton_route
from mmkernels.moe.route.naive import naive_assign, naive_route
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def draw(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(logits: Tensor, top_k: int, capacity: int | None = None, policy: str = "probs", tiles: Tiles = TILES) -> Route:
    """The kernels' route, checked against the definition."""
    ours = triton_route(logits, top_k, capacity, policy, tiles=tiles)
    theirs = naive_route(logits, top_k, capacity, policy)
    torch.testing.assert_close(ours.weight_TK, theirs.weight_TK, rtol=1e-5, atol=1e-30, equal_nan=True)
    for name, mine, other in zip(Route._fields[1:-1], ours[1:-1], theirs[1:-1], strict=True):
        assert mine.dtype == other.dtype == torch.int32, name
        assert torch.equal(mine, other), name
    assert ours.capacity == theirs.capacity == capacity
    return ours


def loop_route(logits: Tensor, top_k: int, capacity: int | None, policy: str) -> tuple[list, list, list]:
    """expert_TK, row_TK and the tokens of the kept rows, an assignment at a time, by sorting lists."""
    experts, priorities = [], []
    for row, prob in zip(logits.tolist(), logits.double().softmax(-1).tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k]
        total = sum(prob[e] for e in best)
        experts.append(best)
        priorities.append([prob[e] / total if top_k > 1 else prob[e] for e in best])
    queues: dict[int, list] = {e: [] for e in range(logits.shape[1])}
    for t, row in enumerate(experts):
        for k, e in enumerate(row):
            # Rounded, so that what is equal in fp32 is equal here.
            queues[e].append((-round(priorities[t][k], 5) if policy == "probs" else 0, t, k))
    slots, tokens = [[-1] * top_k for _ in experts], []
    for e in range(logits.shape[1]):
        for _, t, k in sorted(sorted(queues[e])[:capacity], key=lambda entry: entry[1:]):
            slots[t][k] = len(tokens)
            tokens.append(t)
    return experts, slots, tokens


CASES = [
    (1, 1, 1, 1),
    (1, 4, 4, None),
    (100, 1, 1, 7),
    (64, 8, 2, 16),
    (65, 8, 2, 12),
    (130, 6, 3, 40),
    (77, 5, 5, 30),
    (50, 12, 1, 3),
    (33, 32, 2, 1),
    (40, 7, 2, 1000),
    (40, 7, 2, None),
    (17, 130, 3, 2),
]


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "capacity"), CASES)
def test_kernels_equal_the_definition_and_a_loop(
    tokens: int, experts: int, top_k: int, capacity: int | None, policy: str
) -> None:
    logits = draw(tokens, experts)
    ours = run(logits, top_k, capacity, policy)
    expert, slot, token = loop_route(logits, top_k, capacity, policy)
    assert ours.expert_TK.tolist() == expert and ours.row_TK.tolist() == slot
    rows = min(tokens * top_k, experts * (capacity or tokens * top_k))
    assert ours.token_R.tolist() == token + [-1] * (rows - len(token))
    wanted = [sum(e in row for row in expert) for e in range(experts)]
    assert ours.assigned_E.tolist() == wanted
    assert ours.count_E.tolist() == [min(w, capacity or w) for w in wanted]
    assert ours.offset_E.tolist() == ours.count_E.cumsum(0).tolist() and ours.offset_E[-1] == len(token)


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(40, 6, 2), (33, 5, 1), (7, 9, 3)])
def test_quotas_are_each_expert_s_own_capacity(tokens: int, experts: int, top_k: int, policy: str) -> None:
    """Some of them 0, some more than is wanted."""
    logits, asked = draw(tokens, experts), []
    quota_E = (torch.arange(experts, dtype=torch.int32) * 3 % 11).to(DEVICE)

    def quotas(assigned_E: Tensor) -> Tensor:
        asked.append(assigned_E.clone())
        return quota_E

    ours = route(logits, top_k, None, policy, quotas=quotas, backend="triton")
    theirs = route(logits, top_k, None, policy, quotas=quotas, backend="naive")
    for name, mine, other in zip(Route._fields[1:-1], ours[1:-1], theirs[1:-1], strict=True):
        assert mine.dtype == other.dtype == torch.int32 and torch.equal(mine, other), name
    assert ours.capacity is None
    assert all(torch.equal(assigned_E, ours.assigned_E) and assigned_E.dtype == torch.int32 for assigned_E in asked)
    assert (
        torch.equal(ours.count_E, torch.minimum(ours.assigned_E, quota_E)) and ours.token_R.shape[0] == tokens * top_k
    )
    for expert in range(experts):  # each expert keeps what it would with that capacity for all
        alone = loop_route(logits, top_k, int(quota_E[expert]), policy)[1]
        kept = [[slot >= 0 for slot in row] for row in ours.row_TK.tolist()]
        chosen = (ours.expert_TK == expert).tolist()
        assert all((kept[t][k] == (alone[t][k] >= 0)) for t in range(tokens) for k in range(top_k) if chosen[t][k])


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_of_equal_logits_the_lower_expert_and_of_equal_priorities_the_earlier_token(top_k: int, policy: str) -> None:
    logits = torch.randint(0, 3, (50, 6), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    for values in (logits, torch.zeros_like(logits), -torch.zeros_like(logits), logits[:1].expand(50, 6)):
        for capacity in (1, 9):
            # Here as many priorities are equal as can be, so the order in which a sum is rounded must not matter.
            ours = route(values, top_k, capacity, policy, backend="triton")
            expert, slot, _ = loop_route(values, top_k, capacity, policy)
            assert ours.expert_TK.tolist() == expert
            if top_k == 3 or policy == "position" or not values.is_contiguous():
                assert ours.row_TK.tolist() == slot
    zeros = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]], device=DEVICE)
    assert run(zeros, 2, 1, policy).expert_TK.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("capacity", [1, 13, 60, None])
def test_all_tokens_want_the_same_experts(capacity: int | None, policy: str) -> None:
    logits = draw(61, 9)
    logits[:, 4] += 50
    logits[:, 2] += 40
    ours = run(logits, 2, capacity, policy)
    assert ours.assigned_E.tolist() == [0, 0, 61, 0, 61, 0, 0, 0, 0]
    kept = min(capacity or 61, 61)
    assert ours.count_E.tolist() == [0, 0, kept, 0, kept, 0, 0, 0, 0]


@pytest.mark.parametrize("policy", DROP_POLICIES)
def test_many_blocks_of_every_kernel(policy: str) -> None:
    small = Tiles(tokens=16, scanned=2, listed=16, dropped=16)
    logits = draw(90, 4)
    logits[:, 1] += 2
    for capacity in (1, 37, None):
        run(logits, 2, capacity, policy, small)
    run(logits, 1, 12, policy, small)
    run((logits * 2).round(), 2, 30, policy, small)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_nan_and_infinite_logits_stay_in_range(top_k: int, policy: str) -> None:
    logits = draw(70, 5)
    logits[::3, 1], logits[::7, 4], logits[5], logits[6] = NAN, NAN, NAN, -INF
    logits[::5, 0], logits[1::5, 3], logits[2, 1:] = INF, -INF, -INF
    for values in (logits, torch.full_like(logits, NAN), torch.full_like(logits, -INF)):
        for capacity in (1, 11, None):
            ours = run(values, top_k, capacity, policy)
            assert int(ours.expert_TK.min()) >= 0 and int(ours.expert_TK.max()) < 5
            assert all(len(set(row)) == top_k for row in ours.expert_TK.tolist())
            kept = ours.row_TK[ours.row_TK >= 0].tolist()
            assert sorted(kept) == list(range(int(ours.offset_E[-1]))) and len(kept) <= ours.token_R.shape[0]


@pytest.mark.parametrize("backend", ["triton", "naive"])
def test_no_tokens(backend: str) -> None:
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    ours = route(logits, 2, 3, backend=backend)
    assert ours.weight_TK.shape == ours.expert_TK.shape == ours.row_TK.shape == (0, 2) and ours.token_R.shape == (0,)
    assert ours.count_E.tolist() == ours.assigned_E.tolist() == ours.offset_E.tolist() == [0] * 5
    ours.weight_TK.sum().backward()
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("backend", ["triton", "naive"])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (6, 1), (6, 2), (7, 3), (5, 5)])
def test_gradient_of_the_weights_equals_float64(experts: int, top_k: int, backend: str) -> None:
    logits = (draw(70, experts) * 2).requires_grad_()
    ours = route(logits, top_k, 15, backend=backend)
    assert [x.requires_grad for x in ours[:-1]] == [True] + [False] * 6
    exact = logits.detach().double().requires_grad_()
    weight = exact.gather(1, ours.expert_TK.long()).softmax(-1)
    upstream = draw(top_k, 70, seed=1).T  # not contiguous
    (grad,) = torch.autograd.grad(ours.weight_TK, logits, upstream)
    (expected,) = torch.autograd.grad(weight, exact, upstream.double())
    torch.testing.assert_close(ours.weight_TK.double(), weight, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_route_without_gradient_has_none_and_strides_do_not_matter() -> None:
    logits = draw(6, 40)
    assert not run(logits.T, 2, 10).weight_TK.requires_grad
    assert not route(logits.T.requires_grad_(), 2, backend="triton").expert_TK.requires_grad


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """megatron-core's routing functions; its import takes seconds and warns about missing GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils
    return moe_utils


@pytest.mark.parametrize("policy", DROP_POLICIES)
def test_drops_equal_megatron(megatron: ModuleType, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_of_equals(x: Tensor, k: int, dim: int = -1, **_: object) -> tuple[Tensor, Tensor]:
        index = x.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, k)
        return x.gather(dim, index), index

    monkeypatch.setattr(torch, "topk", first_of_equals)  # torch.topk takes any of equal numbers
    dropped = 0
    for trial in range(8):
        tokens, experts, top_k, factor = 40 + 13 * trial, 3 + trial % 6, 2 + trial % 2, (0.5, 0.8, 1.0, 1.25)[trial % 4]
        ours = run(draw(tokens, experts, seed=trial), top_k, math.ceil(tokens * top_k / experts * factor), policy)
        expert = ours.expert_TK.long()
        weights = torch.zeros(tokens, experts, device=DEVICE).scatter(1, expert, ours.weight_TK)
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(1, expert, ours.row_TK >= 0)
        wanted = torch.zeros_like(kept).scatter(1, expert, True)
        probs, kept_map = megatron.apply_router_token_dropping(weights, wanted, top_k, factor, policy)
        assert torch.equal(kept, kept_map) and torch.equal(weights * kept, probs), trial
        dropped += int((ours.row_TK < 0).sum())
    assert dropped > 100


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("logits_TE", "a tensor", {"logits_TE": [[1.0]]}),
    ("logits_TE", "2 dimensions", {"logits_TE": torch.zeros(3)}),
    ("logits_TE", "float32", {"logits_TE": torch.zeros(3, 4).bfloat16()}),
    ("logits_TE", "1 to 1024", {"logits_TE": torch.zeros(3, 0)}),
    ("logits_TE", "1 to 1024", {"logits_TE": torch.zeros(1, 1025)}),
    ("logits_TE", "2\\^30", {"logits_TE": torch.zeros(1, 4).expand(2**29, 4)}),
    ("top_k", "at least 1", {"top_k": 0}),
    ("top_k", "number of experts, 4", {"top_k": 5}),
    ("top_k", "an int", {"top_k": 1.0}),
    ("capacity", "at least 1", {"capacity": 0}),
    ("capacity", "an int", {"capacity": torch.tensor(3)}),
    ("drop_policy", "probs, position", {"drop_policy": "best"}),
    ("backend", "auto, triton, naive", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD)
def test_bad_arguments_are_refused_by_name(name: str, allowed: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"logits_TE": torch.zeros(3, 4), "top_k": 2, "capacity": 1, "drop_policy": "probs"}
    with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}") as error:
        route(**(good | change))
    assert error.value.argument == name


def test_kernels_refuse_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.common.triton_support.INTERPRETED", False)
    with pytest.raises(KernelArgumentError, match="logits_TE: got device cpu"):
        route(torch.zeros(3, 4), 2, backend="triton")
    assert route(torch.zeros(3, 4), 2).token_R.shape == (6,)


def assert_same(ours: Route, theirs: Route) -> None:
    for name, mine, other in zip(Route._fields, ours, theirs, strict=True):
        assert mine == other if name == "capacity" else torch.equal(mine, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(16384, 32, 2), (16384, 32, 1), (40001, 256, 8), (300000, 48, 2), (999, 1024, 4)]
)
def test_large_routes(tokens: int, experts: int, top_k: int, policy: str) -> None:
    logits = draw(tokens, experts) + torch.linspace(1, 0, experts, device=DEVICE)
    capacity = math.ceil(tokens * top_k / experts)
    ours = route(logits, top_k, capacity, policy, backend="triton")
    again = route(logits, top_k, capacity, policy, backend="triton")
    assert_same(ours, again)
    assert torch.equal(ours.expert_TK, naive_route(logits, top_k).expert_TK)
    if top_k == 1 and policy == "probs":
        return  # the priorities, rounded in another order than torch's, are not in the result
    # The kernels' own weights, because one rounded differently may be dropped differently.
    ranking = ours.weight_TK if policy == "probs" else None
    theirs = naive_assign(ours.weight_TK, ours.expert_TK, experts, capacity, ranking)
    assert_same(ours, theirs)


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    logits = draw(500, 8).requires_grad_()
    route(logits, 2, 50).weight_TK.sum().backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        for policy in DROP_POLICIES:
            route(logits, 2, 50, policy).weight_TK.sum().backward()
        naive_route(logits, 2, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capacity", [None, 5])
def test_an_unknown_drop_policy_is_refused_on_every_path(capacity: int | None) -> None:
    for path in (naive_route, triton_route, route):
        with pytest.raises(KernelArgumentError, match=r"^drop_policy: got 'latest'; allowed: probs, position$"):
            path(draw(8, 4), 2, capacity, "latest")

"""Routing, capacity, auxiliary loss and the expert layer, against megatron-core and against naive float64 code."""

from __future__ import annotations

import math
import random
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.moe import Route
from mmkernels.moe.route.naive import naive_assign
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.router import Router, expert_capacity, load_balancing_loss
from tests.model.small import draw, relative, small_config


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """megatron-core's routing functions; its import takes seconds and warns about missing GPU packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils
    return moe_utils


@pytest.fixture
def stable_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.topk takes any of equal numbers; megatron-core's `position` policy and its ties mean the first of them."""

    def first_of_equals(x: Tensor, k: int, dim: int = -1, **_: object) -> tuple[Tensor, Tensor]:
        index = x.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, k)
        return x.gather(dim, index), index

    monkeypatch.setattr(torch, "topk", first_of_equals)


def chosen(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    best_TK, expert_TK = logits_TE.topk(top_k, dim=-1)
    return best_TK.softmax(-1), expert_TK


def as_map(expert_TK: Tensor, values_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E] with the value of each assignment, zero elsewhere."""
    return values_TK.new_zeros(expert_TK.shape[0], num_experts).scatter(1, expert_TK, values_TK)


def assign(weight_TK: Tensor, expert_TK: Tensor, num_experts: int, capacity: int | None, policy: str) -> Route:
    """What the router does with choices, also with such as no logits lead to."""
    return naive_assign(weight_TK, expert_TK, num_experts, capacity, weight_TK if policy == "probs" else None)


def kept_TK(plan: Route) -> Tensor:
    return plan.row_TK >= 0


def random_logits(rng: random.Random, tokens: int, experts: int) -> Tensor:
    """Plain, lopsided, with experts that nobody wants, or all tokens to the same ones."""
    logits = draw(tokens, experts, seed=rng.randrange(10**9), dtype=torch.float32)
    kind = rng.choice(["plain", "lopsided", "unwanted", "same"])
    if kind == "lopsided":
        logits += torch.linspace(2, 0, experts)
    elif kind == "unwanted" and experts > 3:
        logits[:, rng.randrange(experts)] -= 100
    elif kind == "same":
        logits += torch.linspace(100, 0, experts)
    return logits


@pytest.mark.usefixtures("stable_topk")
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_drops_equal_megatron(megatron: ModuleType, policy: str) -> None:
    rng, dropped, spared = random.Random(policy), 0, 0
    for trial in range(250):
        experts, tokens = rng.randint(1, 12), rng.choice([1, 2, 3, rng.randint(4, 60), rng.randint(61, 300)])
        top_k, factor = rng.randint(1, min(experts, 4)), rng.choice([0.05, 0.3, 0.7, 1.0, 1.1, 1.25, 2.0, 50.0])
        weight, expert = chosen(random_logits(rng, tokens, experts), top_k)
        if trial % 5 == 0:
            weight = (weight * 4).ceil() / 4  # equal weights: the earlier token stays
        wanted_map = as_map(expert, torch.ones_like(expert, dtype=torch.bool), experts)
        probs, kept_map = megatron.apply_router_token_dropping(
            as_map(expert, weight, experts), wanted_map, top_k, factor, policy
        )
        routing = assign(weight, expert, experts, expert_capacity(tokens, top_k, experts, factor), policy)
        case = (trial, tokens, experts, top_k, factor)
        kept = kept_TK(routing)
        assert torch.equal(as_map(expert, kept, experts), kept_map), case
        assert torch.equal(as_map(expert, torch.where(kept, weight, 0), experts), probs), case
        assert torch.equal(routing.count_E.long(), kept_map.sum(0)), case
        dropped, spared = dropped + (not kept.all()), spared + kept.all()
    assert dropped > 50 and spared > 50


def test_drops_of_distinct_weights_equal_megatron_as_it_is(megatron: ModuleType) -> None:
    for trial in range(40):
        tokens, experts, top_k = 20 + trial, 3 + trial % 5, 2 + trial % 2
        logits = draw(tokens, experts, seed=trial)  # float64, so that no two weights are equal
        weight, expert = chosen(logits, top_k)
        wanted_map = as_map(expert, torch.ones_like(expert, dtype=torch.bool), experts)
        expected, _ = megatron.apply_router_token_dropping(
            as_map(expert, weight, experts), wanted_map, top_k, 0.8, "probs"
        )
        routing = assign(weight, expert, experts, expert_capacity(tokens, top_k, experts, 0.8), "probs")
        assert torch.equal(as_map(expert, torch.where(kept_TK(routing), weight, 0), experts), expected), trial


def test_capacity_equals_megatron_to_the_last_token(megatron: ModuleType) -> None:
    for tokens in range(1, 400, 3):
        for top_k in (1, 2, 3):
            for experts in (1, 3, 6, 8, 32):
                for factor in (0.1, 0.7, 1.0, 1.1, 1.2, 1.25, 1.3):
                    expected = megatron.get_capacity(tokens * top_k, experts, factor)
                    assert expert_capacity(tokens, top_k, experts, factor) == expected
    assert expert_capacity(100, 2, 8, 1.25) == 32
    assert expert_capacity(100, 2, 8, None) is None


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_over_capacity_by_hand(policy: str) -> None:
    weight = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    expert = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    routing = assign(weight, expert, 4, 2, policy)
    keep = {
        "probs": [[False, True], [True, False], [True, True], [True, False]],
        "position": [[True, True], [True, True], [False, True], [False, False]],
    }[policy]
    assert kept_TK(routing).tolist() == keep
    assert routing.count_E.tolist() == [2, 2, 1, 0]
    assert torch.equal(routing.weight_TK, weight)  # what is left of a token is not renormalised


@pytest.mark.parametrize("capacity", [None, 1, 5, 1000])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_routing_invariants(policy: str, capacity: int | None) -> None:
    for trial in range(20):
        tokens, experts, top_k = 1 + 3 * trial, 3 + trial % 4, 1 + trial % 3
        weight, expert = chosen(random_logits(random.Random(trial), tokens, experts), top_k)
        routing = assign(weight, expert, experts, capacity, policy)
        count, kept, kept_slots = int(routing.offset_E[-1]), kept_TK(routing), routing.row_TK[kept_TK(routing)]
        assert routing.count_E.sum() == count == kept.sum() and routing.count_E.shape == (experts,)
        assert torch.equal(kept_slots.sort().values, torch.arange(count, dtype=torch.int32))  # each slot once
        assert (routing.row_TK[~kept] == -1).all() and (routing.token_R[count:] == -1).all()
        token_T1 = torch.arange(tokens, dtype=torch.int32)[:, None].expand(tokens, top_k)
        assert torch.equal(routing.token_R[kept_slots], token_T1[kept])
        expert_N = torch.repeat_interleave(torch.arange(experts), routing.count_E)
        assert torch.equal(expert_N[kept_slots], expert[kept])  # sorted by expert
        wanted = torch.bincount(expert.flatten(), minlength=experts)
        assert torch.equal(routing.assigned_E.long(), wanted)
        assert torch.equal(routing.count_E.long(), wanted if capacity is None else wanted.clamp(max=capacity))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (5, 3), (3, 3)])
def test_auxiliary_loss_equals_megatron_with_gradient(megatron: ModuleType, experts: int, top_k: int) -> None:
    logits = (draw(50, experts) + torch.linspace(1, 0, experts)).requires_grad_()
    wanted = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=experts)
    ours = load_balancing_loss(logits.softmax(-1), wanted, top_k) * 0.01
    theirs = megatron.switch_load_balancing_loss_func(logits.softmax(-1), wanted, 50, top_k, experts, 0.01)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-18)
    # The paper's form, by the factor that the docstring gives.
    paper = (wanted.double() / 50 * logits.softmax(-1).mean(0)).mean()
    torch.testing.assert_close(ours * 100 * top_k / experts**2, paper, rtol=1e-12, atol=0)


def test_auxiliary_loss_is_one_when_balanced() -> None:
    assert load_balancing_loss(torch.full((12, 4), 0.25), torch.full((4,), 6), 2).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).expand(12, 4)
    assert load_balancing_loss(collapsed, torch.tensor([12, 0, 0, 0]), 1).item() == pytest.approx(4.0)


def filled(module: nn.Module, scale: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=100 + i) * scale)
    return module


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_router_weights_and_statistics(top_k: int) -> None:
    config = small_config(hidden_size=16, num_experts=6, top_k=top_k, capacity_factor=0.8, aux_loss_coef=0.03)
    router, x = filled(Router(config)), draw(40, 16, dtype=torch.float32)
    routing, stats = router(x)
    logits = x.double() @ router.weight.double().T
    prob = logits.softmax(-1)
    best, expert = logits.topk(top_k, dim=-1)
    assert torch.equal(routing.expert_TK.long(), expert) and routing.weight_TK.dtype == torch.float32
    assert relative(routing.weight_TK, best.softmax(-1)) < 1e-6
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(40))
    wanted = torch.bincount(expert.flatten(), minlength=6)
    kept = wanted.clamp(max=math.ceil(0.8 * 40 * top_k / 6))
    assert torch.equal(routing.count_E.long(), kept)
    assert torch.equal(stats.assigned_E.long(), wanted)
    assert stats.drop_rate.item() == pytest.approx(1 - kept.sum().item() / (40 * top_k), abs=1e-6)
    assert stats.drop_rate > 0 and torch.equal(stats.drop_rate_alone, stats.drop_rate)
    assert stats.entropy.item() == pytest.approx(-(prob * prob.log()).sum(-1).mean().item(), rel=1e-6)
    expected = 0.03 * 6 * (wanted / (40 * top_k) * prob.mean(0)).sum()
    assert stats.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert stats.aux_loss.requires_grad
    assert not (stats.assigned_E.requires_grad or stats.drop_rate.requires_grad or stats.entropy.requires_grad)


def test_entropy_and_drops_of_extreme_routers() -> None:
    config = small_config(hidden_size=16, num_experts=6, top_k=2, capacity_factor=1.0)
    router = Router(config)
    nn.init.zeros_(router.weight)
    x = draw(60, 16, dtype=torch.float32)
    assert router(x)[1].entropy.item() == pytest.approx(math.log(6), rel=1e-6)
    router.weight.data[0], router.weight.data[1] = 20.0, 10.0
    routing, stats = router(x.abs())
    assert routing.count_E.tolist() == [20, 20, 0, 0, 0, 0]
    assert stats.drop_rate.item() == pytest.approx(2 / 3) and stats.assigned_E.tolist() == [60, 60, 0, 0, 0, 0]
    assert 0 <= stats.entropy.item() < 1e-3


def test_nothing_is_dropped_without_a_factor_or_in_evaluation() -> None:
    x = draw(60, 16, dtype=torch.float32).abs()
    for factor, training, drops in [(None, True, False), (None, False, False), (0.5, False, False), (0.5, True, True)]:
        router = filled(Router(small_config(hidden_size=16, capacity_factor=factor))).train(training)
        routing, stats = router(x)
        assert (stats.drop_rate > 0) == drops and kept_TK(routing).all() == (not drops)


def test_router_computes_in_fp32_for_bf16() -> None:
    router, x = filled(Router(small_config(hidden_size=16))).bfloat16(), draw(40, 16, dtype=torch.bfloat16)
    routing, stats = router(x)
    exact = (x.double() @ router.weight.double().T).topk(2)
    assert routing.weight_TK.dtype == stats.aux_loss.dtype == torch.float32
    assert torch.equal(routing.expert_TK.long(), exact.indices)
    assert relative(routing.weight_TK, exact.values.softmax(-1)) < 1e-6


class NaNInUnusedRows(torch.autograd.Function):
    """A grouped product that leaves NaN where one may leave anything: past the last used row, both ways."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, w_EDF: Tensor, offset_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, w_EDF, offset_E)
        y_RF = GROUPED_MM(x_RD, w_EDF, offs=offset_E)
        y_RF[int(offset_E[-1]) :] = torch.nan
        return y_RF

    @staticmethod
    def backward(ctx, dy_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, w_EDF, offset_E = ctx.saved_tensors
        leaves = x_RD.detach().requires_grad_(), w_EDF.detach().requires_grad_()
        with torch.enable_grad():
            y_RF = GROUPED_MM(*leaves, offs=offset_E)
        dx_RD, dw_EDF = torch.autograd.grad(y_RF, leaves, dy_RF)
        dx_RD[int(offset_E[-1]) :] = torch.nan
        return dx_RD, dw_EDF, None


GROUPED_MM = F.grouped_mm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_comes_out_of_unused_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    config = small_config(hidden_size=16, ffn_hidden_size=8, num_experts=5, capacity_factor=1.1)
    x, upstream = draw(30, 16, seed=1, dtype=dtype).abs(), draw(30, 16, seed=2, dtype=dtype)
    results = []
    for grouped_mm in (GROUPED_MM, lambda x, w, offs: NaNInUnusedRows.apply(x, w, offs)):
        monkeypatch.setattr(F, "grouped_mm", grouped_mm)
        moe, leaf = filled(MoE(config)).to(dtype), x.clone().requires_grad_()
        plan, _ = moe.router(leaf)
        assert plan.offset_E[-1] < plan.token_R.shape[0], "some rows must be unused"
        out, _ = moe(leaf)
        out.backward(upstream)
        results.append([out, leaf.grad, *(p.grad for p in moe.parameters())])
    for plain, poisoned in zip(*results, strict=True):
        assert torch.isfinite(plain).all() and torch.equal(plain, poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_read_no_unused_rows(dtype: torch.dtype) -> None:
    x, w, dy = draw(20, 16, dtype=dtype), draw(3, 16, 8, seed=1, dtype=dtype), draw(20, 8, seed=2, dtype=dtype)
    x[12:] = dy[12:] = torch.nan
    leaves = x.requires_grad_(), w.requires_grad_()
    y = F.grouped_mm(*leaves, offs=torch.tensor([5, 5, 12], dtype=torch.int32))
    dx, dw = torch.autograd.grad(y, leaves, dy)
    assert torch.isfinite(y[:12]).all() and torch.isfinite(dx[:12]).all() and torch.isfinite(dw).all()
    assert torch.count_nonzero(dw[1]) == 0


def test_a_layer_without_tokens() -> None:
    moe, x = filled(MoE(small_config(hidden_size=16, capacity_factor=1.0))), torch.zeros(0, 16, requires_grad=True)
    out, stats = moe(x)
    (out.sum() + stats.aux_loss).backward()
    assert out.shape == x.grad.shape == (0, 16) and stats.aux_loss == stats.entropy == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in moe.parameters())


def naive_moe(moe: MoE, x_TD: Tensor, capacity: int | None, position: bool) -> Tensor:
    """A token at a time, in the dtype of x; the first assignments in order of preference fill an expert."""
    to = x_TD.dtype
    router, w13, w2 = moe.router.weight.to(to), moe.experts.w13_E2FD.to(to), moe.experts.w2_EDF.to(to)
    logits = x_TD @ router.T
    picks = [
        [(int(e), weight) for e, weight in zip(row.topk(moe.router.top_k).indices, row.topk(moe.router.top_k)
                                               .values.softmax(-1), strict=True)]
        for row in logits
    ]  # fmt: skip
    # A single pick always weighs 1: there the probability among all experts ranks it.
    rank = logits.softmax(-1)
    alone = moe.router.top_k == 1
    queue = [(rank[t, e].item() if alone else weight.item(), t, e) for t, row in enumerate(picks) for e, weight in row]
    if not position:
        queue.sort(key=lambda entry: -entry[0])
    used: dict[int, list[int]] = {}
    for _, t, e in queue:
        if capacity is None or len(used.setdefault(e, [])) < capacity:
            used.setdefault(e, []).append(t)
    out = []
    for t, row in enumerate(picks):
        y = torch.zeros_like(x_TD[t])
        for e, weight in row:
            if t in used[e]:
                y = y + weight * (w2[e] @ (F.silu(w13[e, 0] @ x_TD[t]) * (w13[e, 1] @ x_TD[t])))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("factor", "top_k"), [(None, 2), (0.6, 2), (0.9, 3), (1.0, 1)])
def test_layer_with_drops_equals_a_loop_over_tokens(factor: float | None, top_k: int, policy: str) -> None:
    config = small_config(hidden_size=16, ffn_hidden_size=8, num_experts=5, top_k=top_k, capacity_factor=factor,
                          drop_policy=policy)  # fmt: skip
    moe, x, upstream = filled(MoE(config)), draw(30, 16, seed=1), draw(30, 16, seed=2)
    ours_x = x.float().requires_grad_()
    ours, stats = moe(ours_x)
    (ours * upstream.float()).sum().backward()
    assert (stats.drop_rate > 0) == (factor is not None)

    twin = filled(MoE(config)).double()
    twin_x = ours_x.detach().double().requires_grad_()
    theirs = naive_moe(twin, twin_x, expert_capacity(30, top_k, 5, factor), policy == "position")
    (theirs * upstream.float().double()).sum().backward()
    assert relative(ours, theirs) < 1e-6
    assert relative(ours_x.grad, twin_x.grad) < 2e-6
    assert relative(moe.experts.w13_E2FD.grad, twin.experts.w13_E2FD.grad) < 2e-6
    assert relative(moe.experts.w2_EDF.grad, twin.experts.w2_EDF.grad) < 2e-6
    if top_k == 1:  # one weight, always 1
        assert torch.count_nonzero(moe.router.weight.grad) == torch.count_nonzero(twin.router.weight.grad) == 0
    else:
        assert relative(moe.router.weight.grad, twin.router.weight.grad) < 5e-6


def test_a_token_with_all_assignments_dropped_gets_zero() -> None:
    config = small_config(hidden_size=16, num_experts=4, top_k=2, capacity_factor=0.1, drop_policy="position")
    moe, x = filled(MoE(config)), draw(10, 16, dtype=torch.float32)
    out, _ = moe(x)
    lost = ~kept_TK(moe.router(x)[0]).any(-1)
    assert lost.any() and torch.count_nonzero(out[lost]) == 0 and (out[~lost].abs().amax(-1) > 0).all()


def test_experts_without_tokens_have_zero_gradient() -> None:
    config = small_config(hidden_size=16, num_experts=4, top_k=1)
    moe = filled(MoE(config))
    moe.router.weight.data[2] = 0
    moe.router.weight.data[2, 0] = 1e4
    x = draw(10, 16, dtype=torch.float32)
    x[:, 0] = 1
    moe(x)[0].sum().backward()
    for grad in (moe.experts.w13_E2FD.grad, moe.experts.w2_EDF.grad):
        assert torch.isfinite(grad).all()
        assert (grad.flatten(1).abs().amax(1) > 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_expert_is_blended_by_its_gate(dtype: torch.dtype) -> None:
    moe = filled(MoE(small_config(hidden_size=16, shared_ffn_hidden_size=7))).to(dtype)
    x, routed = draw(20, 16, dtype=dtype), draw(20, 16, seed=5, dtype=dtype)
    out = moe.shared(x, routed)
    exact = x.double()
    w1, w3 = moe.shared.mlp.w13_2FD.double()
    shared = (F.silu(exact @ w1.T) * (exact @ w3.T)) @ moe.shared.mlp.w2_DF.double().T
    gate = 1 / (1 + torch.exp(-exact @ moe.shared.coefficient.weight.double().T))
    assert out.dtype == dtype
    assert relative(out, (1 - gate) * routed + gate * shared) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        whole, plain = moe(x)[0], moe.experts(x, moe.router(x)[0])
        assert torch.equal(whole, moe.shared(x, plain)) and not torch.equal(whole, plain)


def test_with_one_expert_a_token_the_full_distribution_ranks_what_is_dropped() -> None:
    config = small_config(num_experts=2, top_k=1, capacity_factor=0.5)
    router = Router(config).train()
    x = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
        routing, _ = router(x)
        prob = (x @ router.weight.T).softmax(-1)
    kept = kept_TK(routing)[:, 0]
    for expert in range(2):
        mine = routing.expert_TK[:, 0] == expert
        assert (mine & kept).sum() == min(int(mine.sum()), 10)
        if (mine & ~kept).any():
            assert prob[mine & kept, expert].min() >= prob[mine & ~kept, expert].max()
    assert bool((~kept).any())

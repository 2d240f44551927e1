"""Permute and unpermute against matrix products in float64, forward and backward, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.common.launch_shapes import dividing_block
from mmkernels.moe import Route, permute, route, unpermute
from mmkernels.moe.permute import launch
from mmkernels.moe.permute.naive import naive_permute, naive_unpermute
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]
NAN = float("nan")
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_route(tokens: int, experts: int, top_k: int, capacity: int | None) -> Route:
    return route(draw(tokens, experts, seed=9), top_k, capacity, backend="naive")


def matrices(r: Route) -> tuple[Tensor, Tensor]:
    """float64 one-hot [R, T] that permutes, and [R, T * K] that finds each row's assignment."""
    (tokens, top_k), rows = r.row_TK.shape, r.token_R.shape[0]
    index = torch.where(r.row_TK >= 0, r.row_TK, rows).flatten().long()
    by_assignment = F.one_hot(index, rows + 1).double().T[:-1]
    return by_assignment.view(rows, tokens, top_k).sum(-1), by_assignment


def close(ours: Tensor, exact: Tensor) -> None:
    """Each element off by no more than its rounding, or that of a sum of a few such."""
    assert torch.isfinite(ours).all()
    bound = ROUNDING[ours.dtype]
    torch.testing.assert_close(ours.double(), exact.double(), rtol=bound, atol=bound)


# tokens, experts, top_k, capacity, width
CASES = [
    (1, 1, 1, 1, 1),
    (13, 4, 2, None, 8),
    (30, 4, 2, 5, 37),
    (30, 4, 2, 1000, 16),
    (21, 5, 3, 1, 24),
    (17, 6, 1, 2, 100),
    (9, 4, 4, 3, 33),
    (6, 3, 2, 2, 1536),
    (4, 3, 2, 1, 2100),
    (3, 40, 17, 2, 70),
]


# The kernels take no float64, and wide rows are much the same in float16 as in bfloat16.
KINDS = [
    (case, backend, dtype)
    for case in CASES
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not (dtype == torch.float64 and backend == "triton")
    and not (dtype in (torch.float64, torch.float16) and case[-1] > 100)
]


@pytest.mark.parametrize(("case", "backend", "dtype"), KINDS, ids=str)
def test_equal_products_in_float64_with_gradients(
    case: tuple[int, int, int, int | None, int], backend: str, dtype: torch.dtype
) -> None:
    tokens, experts, top_k, capacity, width = case
    r = make_route(tokens, experts, top_k, capacity)
    by_token, by_assignment = matrices(r)
    rows = r.token_R.shape[0]

    x, upstream = draw(tokens, width, dtype=dtype).requires_grad_(), draw(rows, width, seed=1, dtype=dtype)
    out = permute(x, r, backend=backend)
    (dx,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == dx.dtype == dtype
    assert torch.equal(out.double(), by_token @ x.double())  # copies
    close(dx, by_token.T @ upstream.double())

    y, upstream = draw(rows, width, seed=2, dtype=dtype), draw(tokens, width, seed=3, dtype=dtype)
    leaves = [y.requires_grad_(), r.weight_TK.clone().requires_grad_()]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = unpermute(leaves[0], leaves[1], r, backend=backend)
    exact = by_token.T @ (exact_leaves[0] * (by_assignment @ exact_leaves[1].flatten())[:, None])
    grads = torch.autograd.grad(out, leaves, upstream)
    exact_grads = torch.autograd.grad(exact, exact_leaves, upstream.double())
    assert out.dtype == grads[0].dtype == dtype and grads[1].dtype == torch.float32
    close(out, exact)
    close(grads[0], exact_grads[0])
    # A sum over the row: judged by the length of its terms.
    torch.testing.assert_close(grads[1].double(), exact_grads[1], rtol=1e-5, atol=1e-6 * width**0.5 + 1e-6)
    assert torch.count_nonzero(grads[1][r.row_TK < 0]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_definition_has_the_same_gradients(backend: str) -> None:
    r = make_route(25, 5, 2, 6)
    x, y = draw(25, 12).requires_grad_(), draw(r.token_R.shape[0], 12, seed=1).requires_grad_()
    weight = r.weight_TK.clone().requires_grad_()
    pairs = [
        (permute(x, r, backend=backend), naive_permute(x, r), [x]),
        (unpermute(y, weight, r, backend=backend), naive_unpermute(y, weight, r), [y, weight]),
    ]
    for ours, theirs, leaves in pairs:
        upstream = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, theirs)), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_rows_and_dropped_weights_are_never_read(backend: str) -> None:
    logits = draw(40, 6, seed=9)
    logits[:, 4] -= 100
    r = route(logits, 2, 9, backend="naive")
    kept, rows = int(r.offset_E[-1]), r.token_R.shape[0]
    assert kept < rows and (r.row_TK < 0).any()
    x = draw(40, 20).requires_grad_()
    out, garbage = permute(x, r, backend=backend), draw(rows, 20)
    assert torch.count_nonzero(out[kept:]) == 0
    garbage[kept:] = NAN
    (dx,) = torch.autograd.grad(out, x, garbage)
    assert torch.isfinite(dx).all()
    weight = torch.where(r.row_TK >= 0, r.weight_TK, NAN).requires_grad_()
    y = garbage.clone().requires_grad_()
    out = unpermute(y, weight, r, backend=backend)
    dy, dweight = torch.autograd.grad(out, (y, weight), draw(40, 20, seed=2))
    assert torch.isfinite(out).all() and torch.isfinite(dy).all() and torch.isfinite(dweight).all()
    assert torch.count_nonzero(dy[kept:]) == 0 and torch.count_nonzero(dweight[r.row_TK < 0]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend: str) -> None:
    r = make_route(20, 4, 2, 7)
    rows = r.token_R.shape[0]
    x, y = draw(12, 20).T.requires_grad_(), draw(rows, 24, seed=1)[:, ::2].requires_grad_()
    weight = r.weight_TK.T.contiguous().T.requires_grad_()
    results = [permute(x, r, backend=backend), unpermute(y, weight, r, backend=backend)]
    expected = [permute(x.contiguous(), r, backend="naive"), unpermute(y.contiguous(), weight, r, backend="naive")]
    for ours, theirs, leaves in zip(results, expected, ([x], [y, weight]), strict=True):
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(out.sum(), leaves) for out in (ours, theirs)]  # expanded from one number
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, 8])
def test_no_tokens_or_no_width(backend: str, width: int) -> None:
    for tokens in (0, 5):
        if tokens and width:
            continue
        r = make_route(tokens, 3, 2, 2)
        x = torch.zeros(tokens, width, device=DEVICE, requires_grad=True)
        rows = permute(x, r, backend=backend)
        weight = r.weight_TK.clone().requires_grad_()
        out = unpermute(rows, weight, r, backend=backend)
        assert rows.shape == (r.token_R.shape[0], width) and out.shape == (tokens, width)
        out.sum().backward()
        assert x.grad.shape == x.shape and torch.count_nonzero(weight.grad) == 0


def test_torch_path_passes_gradcheck() -> None:
    r = make_route(9, 4, 2, 3)
    x, weight = draw(9, 4, dtype=torch.float64).requires_grad_(), r.weight_TK.double().requires_grad_()
    y = draw(r.token_R.shape[0], 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: permute(a, r, backend="naive"), (x,))
    assert torch.autograd.gradcheck(lambda a, w: unpermute(a, w, r, backend="naive"), (y, weight))


def layer(x: Tensor, logits: Tensor, w: Tensor, top_k: int, capacity: int | None, policy: str, backend: str) -> Tensor:
    """Experts that multiply by one matrix each."""
    r = route(logits, top_k, capacity, policy, backend=backend)
    rows = permute(x, r, backend=backend)
    ends = r.offset_E.tolist()
    parts = [rows[lo:hi] @ w[e] for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
    unused = rows.new_full((rows.shape[0] - ends[-1], w.shape[2]), NAN)  # what a grouped product may leave there
    return unpermute(torch.cat([*parts, unused]), r.weight_TK, r, backend=backend)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top_k", "capacity"), [(2, None), (2, 11), (3, 8), (1, 6)])
def test_layer_equals_a_dense_formula(top_k: int, capacity: int | None, policy: str, backend: str) -> None:
    tokens, experts, width = 40, 5, 12
    leaves = [draw(tokens, width), draw(tokens, experts, seed=1), draw(experts, width, width, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = draw(tokens, width, seed=3)
    out = layer(*leaves, top_k, capacity, policy, backend)
    grads = torch.autograd.grad(out, leaves, upstream)

    best, chosen = exact[1].topk(top_k)
    weight = torch.zeros_like(exact[1]).scatter(1, chosen, best.softmax(-1))
    priority = exact[1].softmax(-1) if top_k == 1 else weight
    wanted = torch.zeros_like(weight).scatter(1, chosen, 1.0)
    order = priority if policy == "probs" else -torch.arange(tokens, device=DEVICE)[:, None].double()
    rank = ((order[:, None] < order[None, :]) & (wanted[None, :] > 0)).sum(1)  # better ones of the same expert
    kept = wanted * (rank < (tokens if capacity is None else capacity))
    expected = torch.einsum("te,td,edf->tf", weight * kept, exact[0], exact[2])
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=2e-5)


def bad_cases() -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        ("permute", "x_TD", "a tensor", {"x_TD": [1.0]}),
        ("permute", "x_TD", "2 dimensions", {"x_TD": torch.zeros(6)}),
        ("permute", "x_TD", r"\[6, D\]: the tokens", {"x_TD": torch.zeros(5, 4)}),
        ("permute", "x_TD", "float32", {"x_TD": torch.zeros(6, 4).int()}),
        ("permute", "x_TD", "device of the route", {"x_TD": torch.zeros(6, 4, device="meta")}),
        ("permute", "backend", "auto, triton, naive", {"backend": "cuda"}),
        ("permute", "x_TD", "with backend='triton'", {"x_TD": torch.zeros(6, 4).double(), "backend": "triton"}),
        ("unpermute", "y_RD", r"\[6, D\]: the rows", {"y_RD": torch.zeros(12, 4)}),
        ("unpermute", "y_RD", "float32", {"y_RD": torch.zeros(6, 4).int()}),
        ("unpermute", "weight_TK", "float32", {"weight_TK": torch.zeros(6, 2).bfloat16()}),
        ("unpermute", "weight_TK", r"\[6, 2\]", {"weight_TK": torch.zeros(6, 3)}),
        ("unpermute", "weight_TK", "device of y_RD", {"weight_TK": torch.zeros(6, 2, device="meta")}),
    ]


@pytest.mark.parametrize(("function", "name", "allowed", "change"), bad_cases())
def test_bad_arguments_are_refused_by_name(function: str, name: str, allowed: str, change: dict[str, Any]) -> None:
    r = route(torch.zeros(6, 3), 2, 2)  # 6 rows
    good: dict[str, Any] = {"x_TD": torch.zeros(6, 4), "y_RD": torch.zeros(6, 4), "weight_TK": torch.zeros(6, 2)}
    mine = {k: v for k, v in good.items() if (k == "x_TD") == (function == "permute")} | change
    with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}") as error:
        {"permute": permute, "unpermute": unpermute}[function](**mine, route=r)
    assert error.value.argument == name


@pytest.mark.parametrize("width", [1, 16, 100, 512, 1536, 2048, 5120, 6144, 8192, 7168, 12288, 3000])
def test_blocks_are_powers_of_two_that_cover_a_row(width: int) -> None:
    block = dividing_block(width, launch.ROW_BLOCK)
    assert block & (block - 1) == 0 and 16 <= block <= launch.ROW_BLOCK
    assert width % block == 0 or width % (launch.ROW_BLOCK // 4)
    for padded in (1, 2, 8, 256):
        block = launch.reduce_block(width, padded)
        assert block & (block - 1) == 0 and block >= 16
        warps = launch.warps(padded * block, launch.REDUCE_ELEMENTS_PER_THREAD)
        assert warps & (warps - 1) == 0 and 1 <= warps <= launch.MAX_WARPS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2048, 6144, 8192, 5120, 1001])
@pytest.mark.parametrize("capacity", [1024, None])
def test_large_layers_equal_the_definition(capacity: int | None, width: int, dtype: torch.dtype) -> None:
    r = make_route(16384, 32, 2, capacity)
    x = draw(16384, width, dtype=dtype).requires_grad_()
    weight = r.weight_TK.clone().requires_grad_()
    upstream = draw(16384, width, seed=1, dtype=dtype)
    results = []
    for forth, back in ((permute, unpermute), (naive_permute, naive_unpermute)):
        rows = forth(x, r)
        out = back(rows, weight, r)
        results.append([rows, out, *torch.autograd.grad(out, (rows, weight, x), upstream)])
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    tokens, width = 300_000, 4096
    r = make_route(tokens, 16, 2, None)
    x = torch.zeros(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    x[:, 0] = torch.arange(tokens, device=DEVICE) % 256
    x[:, -1] = 1
    rows = permute(x.requires_grad_(), r)
    assert rows.numel() > 2**31
    assert torch.equal(rows[:, 0].float(), (r.token_R % 256).float()) and bool((rows[:, -1] == 1).all())
    out = unpermute(rows, r.weight_TK, r)
    torch.testing.assert_close(out.detach(), x.detach(), rtol=1e-2, atol=1e-2)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad[:, -1].float(), torch.ones(tokens, device=DEVICE), rtol=2e-2, atol=0)


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    r = make_route(500, 8, 2, 50)
    x = draw(500, 64).requires_grad_()
    unpermute(permute(x, r), r.weight_TK, r).sum().backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        unpermute(permute(x, r), r.weight_TK, r).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

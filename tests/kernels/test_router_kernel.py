"""The router's logits and statistics against float64, with gradients, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.router import balance_stats, router_logits
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "naive"]
NAN = float("nan")
HALF_STEP = {torch.float64: 0, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
FP32 = 5e-7
"""Of the length of a sum's terms: a few roundings to fp32. A product in tf32 or bfloat16 errs 100 times as much."""


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Each element off by rounding to its dtype and a few roundings of `terms`, the sum of its terms' lengths."""
    bound = 2 * HALF_STEP[ours.dtype] * exact.abs() + FP32 * terms
    if ours.dtype == torch.float16:
        bound += 2**-24  # below its normal numbers
    assert ((ours.double() - exact).abs() <= bound + 1e-37).all()


# tokens, width, experts
SHAPES = [(1, 1, 1), (5, 3, 2), (64, 128, 16), (70, 37, 40), (200, 150, 9), (130, 256, 64), (33, 130, 70), (3, 8, 300)]
KINDS = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not (backend == "triton" and dtype == torch.float64)
]


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_float64_with_gradients(shape: tuple[int, int, int], backend: str, dtype: torch.dtype) -> None:
    tokens, width, experts = shape
    x = draw(tokens, width, dtype=dtype).requires_grad_()
    weight = draw(experts, width, seed=1).requires_grad_()
    dlogits = draw(tokens, experts, seed=2)
    logits = router_logits(x, weight, backend=backend)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    assert logits.dtype == dweight.dtype == torch.float32 and dx.dtype == dtype
    exact = [a.detach().double() for a in (x if dtype != torch.float64 else x.float(), weight, dlogits)]
    for ours, *factors in ((logits, exact[0], exact[1].T), (dx, exact[2], exact[1]), (dweight, exact[2].T, exact[0])):
        close(ours, factors[0] @ factors[1], factors[0].abs() @ factors[1].abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_any_size_keep_their_precision(dtype: torch.dtype) -> None:
    weight = draw(16, 40, seed=1) * torch.logspace(-25, 25, 16, device=DEVICE)[:, None]
    x = draw(50, 40, dtype=dtype) * torch.logspace(-5, 5, 50, device=DEVICE)[:, None].to(dtype)
    exact = x.double() @ weight.double().T
    close(router_logits(x, weight, backend="triton"), exact, x.double().abs() @ weight.double().abs().T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_argument_alone(backend: str) -> None:
    x, weight, dlogits = draw(70, 40), draw(8, 40, seed=1), draw(70, 8, seed=2)
    (dx,) = torch.autograd.grad(router_logits(x.requires_grad_(), weight, backend=backend), x, dlogits)
    (dw,) = torch.autograd.grad(router_logits(x.detach(), weight.requires_grad_(), backend=backend), weight, dlogits)
    torch.testing.assert_close(dx, dlogits @ weight)
    torch.testing.assert_close(dw, dlogits.T @ x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_token_and_its_expert(backend: str) -> None:
    x, weight, dlogits = draw(70, 40, dtype=torch.bfloat16), draw(10, 40, seed=1), draw(70, 10, seed=2)
    x[3, 7] = weight[4, 39] = dlogits[69, 9] = NAN
    logits = router_logits(x.requires_grad_(), weight.requires_grad_(), backend=backend)
    expected = torch.zeros(70, 10, dtype=torch.bool, device=DEVICE)
    expected[3] = expected[:, 4] = True
    assert torch.equal(logits.isnan(), expected)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    assert dx[69].isnan().all() and dweight[9].isnan().all()
    assert dx[:, 39].isnan().all() and dweight[:, 7].isnan().all()
    assert dx.isnan().sum() == 40 + 69 and dweight.isnan().sum() == 40 + 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_strided_arguments_and_of_none(backend: str) -> None:
    x, weight = draw(40, 30).T.requires_grad_(), draw(16, 80, seed=1)[::2, ::2].requires_grad_()
    logits = router_logits(x, weight, backend=backend)
    torch.testing.assert_close(logits, x @ weight.T)
    for ours, exact in zip(  # the gradient of a sum is one expanded number
        *(torch.autograd.grad(y.sum(), (x, weight)) for y in (logits, x @ weight.T)), strict=True
    ):
        torch.testing.assert_close(ours, exact)
    for tokens, width in ((0, 8), (3, 0), (0, 0)):
        x = torch.zeros(tokens, width, device=DEVICE, requires_grad=True)
        weight = torch.zeros(5, width, device=DEVICE, requires_grad=True)
        logits = router_logits(x, weight, backend=backend)
        logits.sum().backward()
        assert logits.shape == (tokens, 5) and x.grad.shape == x.shape and weight.grad.shape == weight.shape
        assert torch.count_nonzero(logits) == torch.count_nonzero(weight.grad) == 0


def saved_by(call: Callable[[], object]) -> list[int]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call()
    return [x.data_ptr() for x in saved if x is not None]


def test_kernels_save_their_arguments_alone() -> None:
    x, weight = draw(6, 32, dtype=torch.bfloat16).requires_grad_(), draw(4, 32, seed=1).requires_grad_()
    saved = saved_by(lambda: router_logits(x, weight, backend="triton"))
    assert saved == [x.data_ptr(), weight.data_ptr()]
    logits = draw(9, 4).requires_grad_()
    assert saved_by(lambda: balance_stats(logits, backend="triton")) == [logits.data_ptr()]


def test_every_run_gives_the_same_bits() -> None:
    x, weight = draw(300, 140, dtype=torch.bfloat16).requires_grad_(), draw(8, 140, seed=1).requires_grad_()
    runs = []
    for _ in range(2):
        logits = router_logits(x, weight, backend="triton")
        mean, entropy = balance_stats(logits, backend="triton")
        runs.append([logits, mean, entropy, *torch.autograd.grad(mean[3] * 100, (x, weight))])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


# tokens, experts; blocks hold up to 64 tokens
STATS_SHAPES = [(1, 1), (1, 7), (5, 1), (64, 8), (65, 40), (300, 16), (129, 130), (9, 1000), (3, 1024)]
STATS_KINDS = [("triton", torch.float32), ("naive", torch.float32), ("naive", torch.float64)]


@pytest.mark.parametrize(("backend", "dtype"), STATS_KINDS, ids=str)
@pytest.mark.parametrize("shape", STATS_SHAPES, ids=str)
def test_stats_equal_float64_with_gradient(shape: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    logits = (draw(*shape, dtype=dtype) * 4).requires_grad_()
    dmean = draw(shape[1], seed=1, dtype=dtype)
    mean, entropy = balance_stats(logits, backend=backend)
    (dlogits,) = torch.autograd.grad(mean, logits, dmean)
    exact_logits = logits.detach().double().requires_grad_()
    prob = exact_logits.softmax(-1)
    (exact_dlogits,) = torch.autograd.grad(prob.mean(0), exact_logits, dmean.double())
    exact_entropy = -(prob * exact_logits.log_softmax(-1)).sum(-1).mean()
    assert mean.dtype == entropy.dtype == dlogits.dtype == dtype
    assert mean.shape == shape[1:] and entropy.shape == () and not entropy.requires_grad
    torch.testing.assert_close(mean.double(), prob.mean(0), rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(entropy.double(), exact_entropy.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dlogits.double(), exact_dlogits, rtol=1e-5, atol=1e-6 / shape[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (5, 3), (40, 2)])
def test_auxiliary_loss_and_its_gradient_equal_float64(experts: int, top_k: int, backend: str) -> None:
    """E/k sum_i f_i m_i, f the assignments a token and m the mean probability, through router and statistics."""
    tokens, width = 150, 24
    x, weight = draw(tokens, width), draw(experts, width, seed=1)

    def loss(leaves: list[Tensor], stats: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        f = torch.bincount((x @ weight.T).topk(top_k).indices.flatten(), minlength=experts) / tokens
        loss = (stats(*leaves) * f).sum() * (experts / top_k)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    ours = loss(
        [x.clone().requires_grad_(), weight.clone().requires_grad_()],
        lambda x, w: balance_stats(router_logits(x, w, backend=backend), backend=backend)[0],
    )
    exact = loss(
        [x.double().requires_grad_(), weight.double().requires_grad_()], lambda x, w: (x @ w.T).softmax(-1).mean(0)
    )
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=5e-6 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_of_extreme_logits(backend: str) -> None:
    even, entropy = balance_stats(torch.full((70, 6), -1e30, device=DEVICE), backend=backend)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 6))
    assert entropy.item() == pytest.approx(math.log(6), rel=1e-6)
    sure = torch.tensor([[1e4, -1e4, 0.0], [-1e38, 1e38, 0.0]], device=DEVICE, requires_grad=True)
    mean, entropy = balance_stats(sure, backend=backend)
    (dlogits,) = torch.autograd.grad(mean[0], sure)
    assert mean.tolist() == [0.5, 0.5, 0] and entropy.item() == 0 and torch.count_nonzero(dlogits) == 0
    for value in (NAN, float("inf")):
        logits = draw(70, 6)
        logits[66, 2] = value
        mean, entropy = balance_stats(logits.requires_grad_(), backend=backend)
        (dlogits,) = torch.autograd.grad(mean, logits, torch.ones_like(mean))
        assert mean.isnan().all() and entropy.isnan()
        assert dlogits[66].isnan().all() and dlogits.isnan().sum() == 6
    logits = draw(70, 6)
    logits[66, 2] = -float("inf")  # probability 0, of which torch's entropy is NaN
    mean, entropy = balance_stats(logits, backend=backend)
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0))
    assert entropy.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_of_strided_logits_and_of_none(backend: str) -> None:
    logits = draw(12, 80).T[:, ::2].requires_grad_()
    mean, _ = balance_stats(logits, backend=backend)
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0))
    (dlogits,) = torch.autograd.grad(mean.sum(), logits)
    assert dlogits.abs().max() < 1e-8 and dlogits.shape == logits.shape
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    mean, entropy = balance_stats(logits, backend=backend)
    mean.sum().backward()
    assert mean.tolist() == [0] * 5 and entropy.item() == 0 and logits.grad.shape == (0, 5)


def test_torch_path_of_the_stats_passes_gradcheck() -> None:
    logits = draw(9, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: balance_stats(a, backend="naive")[0], (logits,))


X, W, L = "x_TD", "weight_ED", "logits_NE"
BAD: list[tuple[str, str, dict[str, Any]]] = [
    (X, "a tensor of 2 dimensions", {X: 1.0}),
    (X, "2 dimensions", {X: torch.zeros(4)}),
    (X, "bfloat16", {X: torch.zeros(4, 6).int()}),
    (X, "with backend='triton'", {X: torch.zeros(4, 6).double(), "backend": "triton"}),
    (W, "a tensor of 2 dimensions", {W: None}),
    (W, "torch.float32", {W: torch.zeros(3, 6).bfloat16()}),
    (W, r"\[E, 6\] for x_TD \[4, 6\]", {W: torch.zeros(3, 5)}),
    (W, "1 to 1024", {W: torch.zeros(0, 6)}),
    (W, "1 to 1024", {W: torch.zeros(1025, 6)}),
    (W, "the device of x_TD", {W: torch.zeros(3, 6, device="meta")}),
    ("backend", "auto, triton, naive", {"backend": "eager"}),
    (L, "a tensor of 2 dimensions", {L: [1.0]}),
    (L, "2 dimensions", {L: torch.zeros(2, 2, 2)}),
    (L, "torch.float32", {L: torch.zeros(4, 6).bfloat16()}),
    (L, "with backend='triton'", {L: torch.zeros(4, 6).double(), "backend": "triton"}),
    (L, "1 to 1024", {L: torch.zeros(4, 0)}),
    ("backend", "auto, triton, naive", {L: torch.zeros(4, 6), "backend": "eager"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD)
def test_bad_arguments_are_refused_by_name(name: str, allowed: str, change: dict[str, Any]) -> None:
    with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}") as error:
        if L in change:
            balance_stats(**change)
        else:
            router_logits(**({X: torch.zeros(4, 6), W: torch.zeros(3, 6)} | change))
    assert error.value.argument == name


def test_kernels_refuse_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.common.triton_support.INTERPRETED", False)
    with pytest.raises(KernelArgumentError, match="x_TD: got device cpu"):
        router_logits(torch.zeros(3, 4), torch.zeros(2, 4), backend="triton")
    with pytest.raises(KernelArgumentError, match="logits_NE: got device cpu"):
        balance_stats(torch.zeros(3, 4), backend="triton")
    assert router_logits(torch.zeros(3, 4), torch.zeros(2, 4)).shape == (3, 2)
    assert balance_stats(torch.zeros(3, 4))[0].shape == (4,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width", "experts"), [(8192, 6144, 32), (16384, 2048, 64), (5001, 1000, 9)])
def test_large_layers_on_the_gpu(tokens: int, width: int, experts: int, dtype: torch.dtype) -> None:
    """As precise as fp32's own product, against float64: the root mean square of errors."""
    x, weight = draw(tokens, width, dtype=dtype).requires_grad_(), draw(experts, width, seed=1).requires_grad_()
    dlogits = draw(tokens, experts, seed=2)
    logits = router_logits(x, weight)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    exact = [a.detach().double() for a in (x, weight, dlogits)]
    for ours, *factors in ((logits, exact[0], exact[1].T), (dx, exact[2], exact[1]), (dweight, exact[2].T, exact[0])):
        product = factors[0] @ factors[1]
        error, size = (ours.double() - product).square().mean().sqrt(), product.square().mean().sqrt()
        assert error <= size * (2e-6 + HALF_STEP[ours.dtype])
    stats, exact_prob = balance_stats(logits), logits.detach().double().softmax(-1)
    torch.testing.assert_close(stats[0].double(), exact_prob.mean(0), rtol=1e-5, atol=1e-8)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    tokens, width = 400_000, 6144
    x = torch.zeros(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    x[:, -1] = torch.arange(tokens, device=DEVICE) % 256
    weight = draw(8, width).requires_grad_()
    logits = router_logits(x.requires_grad_(), weight)
    torch.testing.assert_close(logits, x[:, -1:].float() * weight[:, -1], rtol=1e-6, atol=0)
    dx, dweight = torch.autograd.grad(logits, (x, weight), torch.ones_like(logits))
    assert torch.equal(dx[-1], dx[0]) and dweight[:, -1].tolist() == pytest.approx([x[:, -1].double().sum().item()] * 8)


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    def step() -> None:
        x = torch.ones(500, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(8, 64, device=DEVICE, requires_grad=True)
        balance_stats(router_logits(x, weight))[0].sum().backward()

    step()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

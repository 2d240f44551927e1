"""Chunked linear cross-entropy against F.cross_entropy, and the memory it never takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkernels.common.triton_support import INTERPRETED
from mmkernels.cross_entropy import logits_to_gradient_, row_statistics
from mmtrain.model import loss as loss_module
from mmtrain.model.loss import IGNORE, linear_cross_entropy
from tests.model.small import draw, relative
from tests.parallel.memory.storage_peak import StoragePeak

TOKENS, WIDTH, VOCAB = 37, 8, 23
LABELS = {
    "all": lambda labels: labels,
    "some_ignored": lambda labels: labels.where(torch.arange(TOKENS) % 3 > 0, IGNORE),
    "whole_chunk_ignored": lambda labels: labels.where(torch.arange(TOKENS) >= 16, IGNORE),
    "one_left": lambda labels: labels.where(torch.arange(TOKENS) == 36, IGNORE),
    "none_left": lambda labels: torch.full_like(labels, IGNORE),
}


@pytest.fixture(params=["in torch", "by kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a CPU, and as on a GPU, with the kernels where the interpreter runs them on CPU tensors."""
    if request.param == "by kernels":
        monkeypatch.setattr(loss_module, "has_kernel", lambda _: True)
        for call in (row_statistics, logits_to_gradient_):

            def run(x: Tensor, *rest: Tensor, call: Callable = call) -> Tensor:
                return call(x, *rest, backend="triton" if INTERPRETED and x.dtype != torch.float64 else "naive")

            monkeypatch.setattr(loss_module, call.__name__, run)
    return request.param


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(3))
    x, weight = draw(tokens, WIDTH, seed=1, dtype=dtype), draw(VOCAB, WIDTH, seed=2, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_cross_entropy_with_gradients(
    dtype: torch.dtype, tolerance: float, case: str, chunk: int, path: str
) -> None:
    x, weight, labels = inputs(dtype)
    labels = LABELS[case](labels)
    loss = linear_cross_entropy(x, weight, labels, chunk)
    (loss * 0.37).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), labels, ignore_index=IGNORE, reduction="sum")
    (expected * 0.37).backward()
    assert loss.dtype == dtype and x.grad.dtype == weight.grad.dtype == dtype
    assert relative(loss, expected) < tolerance
    assert relative(x.grad, exact[0].grad) < tolerance
    assert relative(weight.grad, exact[1].grad) < tolerance
    assert torch.count_nonzero(x.grad[labels == IGNORE]) == 0


def test_large_logits_do_not_overflow(path: str) -> None:
    x, weight, labels = inputs(torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, labels, 8)
    expected = F.cross_entropy(x.double() * 1e4 @ weight.double().T, labels, reduction="sum")
    assert relative(loss, expected) < 1e-6


def test_gradcheck() -> None:
    x, weight, labels = inputs(torch.float64, tokens=7)
    labels[2] = IGNORE
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, labels, 3), (x, weight))


@pytest.mark.parametrize("needed", ["x", "weight", "neither"])
def test_only_the_gradients_asked_for(needed: str, path: str) -> None:
    x, weight, labels = inputs(torch.float64)
    exact = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    full = dict(zip(("x", "weight"), torch.autograd.grad(exact, (x, weight)), strict=True))
    held = {"x": x.detach(), "weight": weight.detach()}
    if needed != "neither":
        held[needed].requires_grad_()
    loss = linear_cross_entropy(held["x"], held["weight"], labels, 8)
    assert relative(loss, exact) < 1e-13
    assert loss.requires_grad == (needed != "neither")
    if needed != "neither":
        loss.backward()
        assert relative(held[needed].grad, full[needed]) < 1e-12


def test_no_tokens_give_zero_loss_and_zero_gradients(path: str) -> None:
    x, weight, labels = inputs(torch.float32, tokens=0)
    loss = linear_cross_entropy(x, weight, labels, 8)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, WIDTH)
    assert weight.grad.shape == weight.shape and torch.count_nonzero(weight.grad) == 0


def test_bf16_inputs_are_summed_in_fp32(path: str) -> None:
    x, weight, labels = inputs(torch.bfloat16, tokens=300)
    loss = linear_cross_entropy(x, weight, labels, 1)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative(loss, expected) < 2e-3
    # A sum of 300 chunks in bf16 is off by 1.4e-2.
    assert relative(weight.grad, exact[1].grad) < 4e-3 and relative(x.grad, exact[0].grad) < 4e-3


@pytest.mark.gpu
def test_on_a_gpu_gradients_of_weights_are_summed_in_fp32() -> None:
    x, weight, labels = (t.detach().cuda() for t in inputs(torch.bfloat16, tokens=3000))
    exact = [t.double().requires_grad_() for t in (x, weight)]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    labels[::5] = IGNORE
    loss = linear_cross_entropy(x, weight, labels, 100)
    loss.backward()
    expected = F.cross_entropy(F.linear(*exact), labels, ignore_index=IGNORE, reduction="sum")
    expected.backward()
    assert relative(loss, expected) < 2e-3
    assert relative(weight.grad, exact[1].grad) < 4e-3 and relative(x.grad, exact[0].grad) < 4e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_never_holds_all_logits_of_the_released_vocabulary() -> None:
    vocab, tokens, chunk = 200_064, 512, 64
    x, weight = torch.zeros(tokens, 16).requires_grad_(), torch.zeros(vocab, 16).requires_grad_()
    labels = torch.full((tokens,), vocab - 1)
    with LargestTensor() as seen:
        loss = linear_cross_entropy(x, weight, labels, chunk)
        loss.backward()
    assert seen.elements == chunk * vocab  # the watcher works, and nothing is larger
    assert loss.item() == pytest.approx(tokens * torch.log(torch.tensor(float(vocab))).item(), rel=1e-6)
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_holds_the_gradient_of_the_head_twice(dtype: torch.dtype) -> None:
    """Its sum, in fp32, and the result."""
    vocab, width = 5000, 64
    x, weight = (torch.zeros(n, width, dtype=dtype).requires_grad_() for n in (8, vocab))
    loss = linear_cross_entropy(x, weight, torch.zeros(8, dtype=torch.int64), 8)
    with StoragePeak() as found:
        loss.backward()
    assert weight.grad.dtype == dtype and found.peak < 1.05 * vocab * width * (4 + dtype.itemsize)

"""The gated norm against float64 autograd of its definition, in both backends, with and without a split over ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.norm_gate import eager, launch, norm_gate
from mmkernels.norm_gate.naive import naive_norm_gate
from tests.kernels.poison import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter cuts bfloat16 off where the compiler rounds.
BOUND = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3,
    torch.float16: 1e-3,
}
EPS = 1e-3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, launch)


def make(rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """o, gate, weight and dy, which has the output's dtype; rows of o are of very different size, one of them 0."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    o, gate, dy = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(3))
    o *= torch.logspace(-3, 2, rows, dtype=torch.float64)[:, None]
    o[rows // 2 :][:1] = 0
    weight = 1 + 0.5 * torch.randn(width, generator=generator, dtype=torch.float64)
    return [
        o.to(DEVICE, dtype),
        (3 * gate).to(DEVICE, dtype),
        weight.to(DEVICE, weight_dtype or dtype),
        dy.to(DEVICE, dtype),
    ]


def run(tensors: list[Tensor], call: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
    """Output and gradients; the tensors become leaves as they are, strides included."""
    *inputs, dy = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = call(*inputs, EPS, **options)
    grads = torch.autograd.grad(y, inputs, dy.to(y.device, y.dtype))
    return dict(zip(("y", "do", "dgate", "dweight"), (y.detach(), *grads), strict=True))


def want(tensors: list[Tensor]) -> dict[str, Tensor]:
    return run([x.double() for x in tensors], naive_norm_gate)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Relative error by norm of every row, so that a small row cannot hide behind a large one."""
    for name, value in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - value).norm(dim=-1)
        scale = value.norm(dim=-1)
        assert (error <= BOUND[dtype] * scale + 1e-30).all(), f"{name}: {(error / scale).max().item():.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (7, 96), (5, 3), (4, 480), (9, 1024), (2, 6144)])
def test_output_and_gradients(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    for weight_dtype in {dtype, torch.float32}:
        tensors = make(rows, width, dtype, weight_dtype)
        got = run(tensors, norm_gate, backend=backend)
        assert all(got[name].dtype == dtype for name in ("y", "do", "dgate")) and got["dweight"].dtype == weight_dtype
        assert_close(got, want(tensors), dtype)


def test_float64_runs_in_torch() -> None:
    tensors = make(6, 40, torch.float64)
    assert_close(run(tensors, norm_gate), want(tensors), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    called = []

    def reduce(x_T: Tensor) -> Tensor:
        called.append(x_T.shape)
        return x_T

    for options in ({}, {"width": 96, "reduce": reduce}):
        got = run(make(0, 48, torch.bfloat16), norm_gate, backend=backend, **options)
        assert got["y"].shape == got["do"].shape == (0, 48) and (got["dweight"] == 0).all()
    assert called == [(0,), (0,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_any_distance(backend: str) -> None:
    o, gate, weight, dy = make(6, 64, torch.bfloat16)
    plain = run([o, gate, weight, dy], norm_gate, backend=backend)
    wide = torch.cat([o, gate, o], dim=1)
    every_other = torch.stack([gate, o], dim=1).flatten(0, 1)[::2]
    strided = run([wide[:, :64], every_other, weight, dy], norm_gate, backend=backend)
    shifted = torch.zeros(6 * 70 + 1, dtype=o.dtype, device=DEVICE)[1:].view(6, 70)[:, 3:67].copy_(o)
    unaligned = run([shifted, gate, weight, dy], norm_gate, backend=backend)
    for name, value in plain.items():
        torch.testing.assert_close(strided[name], value, rtol=0, atol=0)
        torch.testing.assert_close(unaligned[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum_and_of_a_transposed_view(backend: str) -> None:
    tensors = make(5, 64, torch.float32)
    one = torch.ones((), dtype=torch.float64, device=DEVICE).expand(5, 64)
    for dy in (one, torch.randn(64, 5, dtype=torch.float64).t().to(DEVICE)):
        tensors[3] = dy
        inputs = [x.clone().requires_grad_() for x in tensors[:3]]
        y = norm_gate(*inputs, EPS, backend=backend)
        torch.autograd.backward(y, dy.float())
        got = dict(zip(("do", "dgate", "dweight"), (x.grad for x in inputs), strict=True))
        expected = want(tensors)
        del expected["y"]
        assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_gates_and_large_values_stay_finite(backend: str) -> None:
    o, gate, weight, dy = make(4, 64, torch.float32)
    tensors = [o * 1e15, torch.sign(gate) * 200, weight, dy]
    got = run(tensors, norm_gate, backend=backend)
    assert all(torch.isfinite(x).all() for x in got.values())
    assert_close({"y": got["y"]}, {"y": want(tensors)["y"]}, torch.float32)


def on_two_ranks(tensors: list[Tensor], cut: int, backend: str) -> dict[str, Tensor]:
    """Both halves of the columns in threads of their own; reduce adds the two halves' statistics at a barrier."""
    o, gate, weight, dy = tensors
    width, barrier, parts = o.shape[1], threading.Barrier(2, timeout=60), [None, None]
    results: list[dict[str, Tensor] | None] = [None, None]

    def rank(index: int, columns: slice) -> None:
        def reduce(x_T: Tensor) -> Tensor:
            assert x_T.dtype == torch.float32 and x_T.shape == o.shape[:1]
            parts[index] = x_T.clone()
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        local = [o[:, columns], gate[:, columns], weight[columns], dy[:, columns]]
        results[index] = run(local, norm_gate, width=width, reduce=reduce, backend=backend)

    threads = [threading.Thread(target=rank, args=args) for args in ((0, slice(0, cut)), (1, slice(cut, width)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: torch.cat([results[0][name], results[1][name]], dim=-1) for name in results[0]}


@pytest.mark.parametrize("cut", [48, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_over_two_ranks_in_torch(dtype: torch.dtype, cut: int) -> None:
    # On the CPU: autograd has one thread for a GPU, in which both ranks' backward would wait for one another.
    tensors = [x.cpu() for x in make(7, 96, dtype)]
    assert_close(on_two_ranks(tensors, cut, "torch"), want(tensors), dtype)


@pytest.mark.parametrize("cut", [48, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_over_two_ranks_in_triton(dtype: torch.dtype, cut: int) -> None:
    # The interpreter keeps its program ids in globals: no threads, but the other half's statistic worked out ahead.
    o, gate, weight, dy = tensors = make(7, 96, dtype)
    parts = []
    for columns, other in ((slice(0, cut), slice(cut, 96)), (slice(cut, 96), slice(0, cut))):
        o_, gate_, weight_, dy_ = o[:, other], gate[:, other], weight[other], dy[:, other].to(dtype)
        statistics = [eager.sum_squares(o_), eager.dots(dy_, o_, gate_, weight_)]
        local = [o[:, columns], gate[:, columns], weight[columns], dy[:, columns]]
        parts.append(run(local, norm_gate, width=96, reduce=lambda x, s=statistics: x + s.pop(0), backend="triton"))
        assert not statistics
    got = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
    assert_close(got, want(tensors), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_identity_reduce_changes_nothing(backend: str) -> None:
    tensors = make(7, 96, torch.float32)
    plain = run(tensors, norm_gate, backend=backend)
    split = run(tensors, norm_gate, backend=backend, width=96, reduce=lambda x: x)
    for name, value in plain.items():
        torch.testing.assert_close(split[name], value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend: str) -> None:
    tensors = make(9, 96, torch.bfloat16)
    kept = [x.clone() for x in tensors]
    runs = [run(tensors, norm_gate, backend=backend) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = make(5, 64, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(tensors, norm_gate)
    assert_close(got, want(tensors), torch.float32)


def good() -> dict[str, Any]:
    o, gate, weight, _ = make(4, 8, torch.float32)
    return {"o_TI": o, "gate_TI": gate, "weight_I": weight, "eps": EPS}


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("o_TI", "a tensor", {"o_TI": [1.0]}),
    ("o_TI", "2 dimensions", {"o_TI": torch.zeros(8)}),
    ("o_TI", "torch.float32 or", {"o_TI": torch.zeros(4, 8, dtype=torch.int32)}),
    ("o_TI", "at least one column", {"o_TI": torch.zeros(4, 0)}),
    ("o_TI", "stride 1", {"o_TI": torch.zeros(8, 4).t()}),
    ("gate_TI", "torch.float32", {"gate_TI": torch.zeros(4, 8, dtype=torch.bfloat16)}),
    ("gate_TI", r"\[4, 8\]", {"gate_TI": torch.zeros(4, 9)}),
    ("gate_TI", "the device of o_TI", {"gate_TI": torch.zeros(4, 8, device="meta")}),
    ("weight_I", r"\[8\]", {"weight_I": torch.zeros(4)}),
    ("weight_I", "torch.float32", {"weight_I": torch.zeros(8, dtype=torch.float16)}),
    ("weight_I", "1 dimensions", {"weight_I": torch.zeros(1, 8)}),
    ("eps", ">= 0", {"eps": -1.0}),
    ("eps", ">= 0", {"eps": float("nan")}),
    ("width", "None without", {"width": 16}),
    ("width", "with reduce", {"reduce": lambda x: x}),
    ("width", "at least", {"width": 7, "reduce": lambda x: x}),
    ("backend", "auto, triton, torch", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD)])
def test_bad_argument(name: str, allowed: str, change: dict[str, Any]) -> None:
    arguments = good() | change
    arguments = {
        key: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x for key, x in arguments.items()
    }
    with pytest.raises(KernelArgumentError, match=allowed) as caught:
        norm_gate(**arguments)
    assert str(caught.value).startswith(f"{name}: got ") and "\n" not in str(caught.value)


def test_what_triton_cannot_run_is_refused_and_auto_takes_torch() -> None:
    for width, dtype, allowed in ((8, torch.float64, "float16 with backend='triton'"), (16385, torch.float32, "16384")):
        o, gate, weight = (
            torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((2, width), (2, width), (width,))
        )
        with pytest.raises(KernelArgumentError, match=allowed):
            norm_gate(o, gate, weight, EPS, backend="triton")
        assert torch.isfinite(norm_gate(o, gate, weight, EPS)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(4099, 8192), (1031, 6144), (777, 16384), (5000, 1024), (300, 9000)])
def test_big_shapes(rows: int, width: int, dtype: torch.dtype) -> None:
    tensors = make(rows, width, dtype, torch.float32)
    expected = want(tensors)
    assert_close(run(tensors, norm_gate, backend="triton"), expected, dtype)
    split = run(tensors, norm_gate, backend="triton", width=width, reduce=lambda x: x)
    assert_close(split, expected, dtype)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    rows, width = 2**18 + 3, 8192
    o, gate = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(width, device="cuda")
    y = norm_gate(o, gate, weight, EPS, backend="triton")
    tail = naive_norm_gate(o[-3:], gate[-3:], weight, EPS)
    assert_close({"y": y[-3:]}, {"y": tail}, torch.bfloat16)

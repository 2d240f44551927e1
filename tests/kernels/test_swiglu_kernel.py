"""SwiGLU's activation against float64 autograd, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.swiglu import swiglu, swiglu_grad
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "eager", "naive"]
NAN = float("nan")
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE, dtype)


def exact_with_gradient(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = gate_up.detach().double().requires_grad_()
    gate, up = x.chunk(2, -1)
    y = F.silu(gate) * up
    return y, torch.autograd.grad(y, x, dy.double())[0]


def close(ours: Tensor, exact: Tensor) -> None:
    bound = ROUNDING[ours.dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=bound)


KINDS = [(b, d) for b in BACKENDS for d in ROUNDING if not (b == "triton" and d == torch.float64)]  # it takes none


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (9, 74), (3, 5, 64), (7, 1536), (4, 2816), (2, 4200)])
def test_equals_float64_with_gradient(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    gate_up = draw(*shape, dtype=dtype).requires_grad_()
    dy = draw(*shape[:-1], shape[-1] // 2, seed=1, dtype=dtype)
    y = swiglu(gate_up, backend=backend)
    (grad,) = torch.autograd.grad(y, gate_up, dy)
    exact, exact_grad = exact_with_gradient(gate_up, dy)
    assert y.dtype == grad.dtype == dtype and y.shape == dy.shape
    close(y, exact)
    close(grad, exact_grad)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rows"), [((9, 74), None), ((9, 74), 4), ((5, 4200), 5), ((3, 64), 0)])
def test_gradient_and_output_at_once(
    shape: tuple[int, int], rows: int | None, backend: str, dtype: torch.dtype
) -> None:
    gate_up, dy = draw(*shape, dtype=dtype), draw(shape[0], shape[1] // 2, seed=1, dtype=dtype)
    exact, exact_grad = exact_with_gradient(gate_up, dy)
    count = None
    if rows is not None:
        count = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        for x in (gate_up, dy, exact, exact_grad):
            x.data[rows:] = 0 if x.dtype == torch.float64 else NAN
    grad, y = swiglu_grad(gate_up, dy, count, backend=backend)
    assert grad.dtype == y.dtype == dtype
    close(y, exact)
    close(grad, exact_grad)


def test_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match="dy_NF"):
        swiglu_grad(draw(4, 6), draw(4, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 6, 10])
def test_rows_past_the_last_are_zero_and_unread(rows: int, backend: str) -> None:
    gate_up, dy = draw(2, 5, 36), draw(2, 5, 18, seed=1)
    exact, exact_grad = exact_with_gradient(gate_up, dy)
    for x in (gate_up, dy, exact, exact_grad):
        x.data.flatten(0, 1)[rows:] = 0 if x.dtype == torch.float64 else NAN
    if backend == "naive":
        dy.nan_to_num_()  # autograd multiplies by zero there
        gate_up.nan_to_num_()
    y = swiglu(gate_up.requires_grad_(), torch.tensor(rows, dtype=torch.int32, device=DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(y, gate_up, dy)
    close(y, exact)
    close(grad, exact_grad)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_numbers_and_nan(backend: str) -> None:
    inputs = [[-1e30, 2.0], [1e4, 2.0], [-200.0, 1.0], [0.0, 5.0], [NAN, 1.0], [1.0, NAN]]
    gate_up = torch.tensor(inputs, device=DEVICE, requires_grad=True)
    y = swiglu(gate_up, backend=backend)
    y.sum().backward()
    assert y[:4, 0].tolist() == [0, 2e4, pytest.approx(0, abs=1e-30), 0] and bool(y[4:].isnan().all())
    assert gate_up.grad[:4].tolist() == [[0, 0], [2, 1e4], [pytest.approx(0, abs=1e-30)] * 2, [2.5, 0]]
    assert bool(gate_up.grad[4].isnan().all()) and bool(gate_up.grad[5, 0].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_expanded_gradients_and_empty_inputs(backend: str) -> None:
    gate_up = draw(24, 7).T.requires_grad_()
    y = swiglu(gate_up, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), gate_up)
    exact, exact_grad = exact_with_gradient(gate_up, torch.ones(7, 12, device=DEVICE))
    close(y, exact)
    close(grad, exact_grad)
    for shape in ((0, 8), (3, 0), (2, 0, 6)):
        gate_up = torch.zeros(shape, device=DEVICE, requires_grad=True)
        y = swiglu(gate_up, backend=backend)
        y.sum().backward()
        assert y.shape == (*shape[:-1], shape[-1] // 2) and gate_up.grad.shape == shape


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_saves_its_input_alone(backend: str) -> None:
    saved: list[Tensor] = []
    gate_up = draw(6, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate_up, backend=backend)
    assert [x.data_ptr() for x in saved if x is not None] == [gate_up.data_ptr()]


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("gate_up_N2F", "a tensor", {"gate_up_N2F": 1.0}),
    ("gate_up_N2F", "2 dimensions or more", {"gate_up_N2F": torch.zeros(4)}),
    ("gate_up_N2F", "2F", {"gate_up_N2F": torch.zeros(4, 3)}),
    ("gate_up_N2F", "bfloat16, float16", {"gate_up_N2F": torch.zeros(4, 2).int()}),
    ("gate_up_N2F", "with backend='triton'", {"gate_up_N2F": torch.zeros(4, 2).double(), "backend": "triton"}),
    ("rows", "int32", {"rows": 3}),
    ("rows", "int32", {"rows": torch.tensor(3)}),
    ("rows", "one element", {"rows": torch.zeros(2, dtype=torch.int32)}),
    ("rows", "the device of gate_up_N2F", {"rows": torch.zeros((), dtype=torch.int32, device="meta")}),
    ("backend", "auto, triton, eager, naive", {"backend": "fast"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD)
def test_bad_arguments_are_refused_by_name(name: str, allowed: str, change: dict[str, Any]) -> None:
    with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}") as error:
        swiglu(**({"gate_up_N2F": torch.zeros(4, 2)} | change))
    assert error.value.argument == name


def test_kernel_refuses_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.common.triton_support.INTERPRETED", False)
    with pytest.raises(KernelArgumentError, match="gate_up_N2F: got device cpu"):
        swiglu(torch.zeros(3, 4), backend="triton")
    assert swiglu(torch.zeros(3, 4)).shape == (3, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("count", "width"), [(32768, 9216), (32768, 1408), (5001, 1000), (300_000, 4096)])
def test_large_inputs_on_the_gpu(count: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.tensor(count - 77, dtype=torch.int32, device=DEVICE)
    # Rows repeat, so that one block of them, in float64, is enough to compare with.
    gate_up, dy = draw(1000, 2 * width, dtype=dtype), draw(1000, width, seed=1, dtype=dtype)
    exact, exact_grad = exact_with_gradient(gate_up, dy)
    repeats = count // 1000 + 1
    x = gate_up.repeat(repeats, 1)[:count].requires_grad_()
    y = swiglu(x, rows)
    y.backward(dy.repeat(repeats, 1)[:count])
    for ours, theirs in ((y.detach(), exact), (x.grad, exact_grad)):
        close(ours[:1000], theirs)
        assert torch.count_nonzero(ours[-77:]) == 0
        used = count - 77
        last = used // 1000 * 1000
        assert torch.equal(ours[last:used], ours[: used - last])

"""RMSNorm and the fused residual sum against float64 autograd of their definitions, in both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.norm import add_rms_norm, launch, rms_norm
from mmkernels.norm.naive import naive_add_rms_norm, naive_rms_norm
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
EPS, ALPHA = 1e-3, 3.56
SHAPES = [(1, 128), (7, 96), (5, 3), (4, 480), (9, 1024), (2, 6144)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, launch)


def make(rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Inputs and gradients; rows of x are of very different size, one of them 0."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x, y, dnormed, dh = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(4))
    size = torch.logspace(-3, 2, rows, dtype=torch.float64)[:, None]
    x, y = size * x, size * y
    x[rows // 2 :][:1] = y[rows // 2 :][:1] = 0
    weight = 1 + 0.5 * torch.randn(width, generator=generator, dtype=torch.float64)
    made = {"x": x, "y": y, "dnormed": dnormed, "dh": dh}
    return {name: value.to(DEVICE, dtype) for name, value in made.items()} | {
        "weight": weight.to(DEVICE, weight_dtype or dtype)
    }


def doubles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in tensors.items()}


def run_norm(tensors: dict[str, Tensor], call: Any, **options: Any) -> dict[str, Tensor]:
    x, weight = (tensors[name].detach().requires_grad_() for name in ("x", "weight"))
    normed = call(x, weight, EPS, **options)
    dx, dweight = torch.autograd.grad(normed, (x, weight), tensors["dnormed"])
    return {"normed": normed.detach(), "dx": dx, "dweight": dweight}


def run_add(tensors: dict[str, Tensor], call: Any, uses: str = "normed h", **options: Any) -> dict[str, Tensor]:
    """Output and gradients when only the outputs named in ``uses`` reach the loss."""
    x, y, weight = (tensors[name].detach().requires_grad_() for name in ("x", "y", "weight"))
    outputs = dict(zip(("normed", "h"), call(x, y, ALPHA, weight, EPS, **options), strict=True))
    used = uses.split()
    grads = torch.autograd.grad(
        [outputs[name] for name in used], (x, y, weight), [tensors["d" + name] for name in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {name: out.detach() for name, out in outputs.items()} | dict(
        zip(("dx", "dy", "dweight"), grads, strict=True)
    )


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Relative error by norm of every row, so that a small row cannot hide behind a large one."""
    for name, value in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - value).norm(dim=-1)
        scale = value.norm(dim=-1)
        assert (error <= BOUND[dtype] * scale + 1e-30).all(), f"{name}: {(error / scale).max().item():.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    for weight_dtype in {dtype, torch.float32}:
        tensors = make(rows, width, dtype, weight_dtype)
        got = run_norm(tensors, rms_norm, backend=backend)
        assert got["normed"].dtype == got["dx"].dtype == dtype and got["dweight"].dtype == weight_dtype
        assert_close(got, run_norm(doubles(tensors), naive_rms_norm), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_sum_and_norm(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    tensors = make(rows, width, dtype, torch.float32)
    got = run_add(tensors, add_rms_norm, backend=backend)
    assert (
        all(got[name].dtype == dtype for name in ("normed", "h", "dx", "dy")) and got["dweight"].dtype == torch.float32
    )
    expected = run_add(doubles(tensors), naive_add_rms_norm)
    assert_close({"h": got["h"]}, {"h": expected["h"]}, dtype)
    # The norm and its gradient belong to h as it was rounded.
    rounded = run_norm(doubles(tensors) | {"x": got["h"].double()}, naive_rms_norm)
    total = rounded["dx"] + tensors["dh"].double()
    want = {"normed": rounded["normed"], "dx": ALPHA * total, "dy": total, "dweight": rounded["dweight"]}
    assert_close(got, want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uses", ["normed", "h", "normed h"])
def test_gradients_of_the_outputs_that_are_used(uses: str, backend: str) -> None:
    tensors = make(7, 96, torch.float32)
    got = run_add(tensors, add_rms_norm, uses, backend=backend)
    assert_close(got, run_add(doubles(tensors), naive_add_rms_norm, uses), torch.float32)


def test_float64_runs_in_torch() -> None:
    tensors = make(6, 40, torch.float64)
    assert_close(run_norm(tensors, rms_norm), run_norm(tensors, naive_rms_norm), torch.float64)
    assert_close(run_add(tensors, add_rms_norm), run_add(tensors, naive_add_rms_norm), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    tensors = make(0, 48, torch.bfloat16)
    for got in (run_norm(tensors, rms_norm, backend=backend), run_add(tensors, add_rms_norm, backend=backend)):
        assert got["normed"].shape == got["dx"].shape == (0, 48) and (got["dweight"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_at_any_distance(backend: str) -> None:
    tensors = make(6, 64, torch.bfloat16)
    x, y = tensors["x"], tensors["y"]
    plain = run_add(tensors, add_rms_norm, backend=backend)
    shifted = torch.zeros(6 * 70 + 1, dtype=x.dtype, device=DEVICE)[1:].view(6, 70)[:, 3:67].copy_(y)
    views = {"x": torch.stack([y, x], dim=1).flatten(0, 1)[1::2], "y": shifted}
    views["dh"] = tensors["dh"].t().contiguous().t()
    got = run_add(tensors | views, add_rms_norm, backend=backend)
    for name, value in plain.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    alone = run_norm(tensors, rms_norm, backend=backend)
    got = run_norm(tensors | {"x": views["x"]}, rms_norm, backend=backend)
    for name, value in alone.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend: str) -> None:
    tensors = make(5, 64, torch.float32)
    one = torch.ones((), device=DEVICE).expand(5, 64)
    tensors |= {"dnormed": one, "dh": one}
    got = run_add(tensors, add_rms_norm, backend=backend)
    assert_close(got, run_add(doubles(tensors), naive_add_rms_norm), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend: str) -> None:
    tensors = make(9, 96, torch.bfloat16)
    kept = {name: x.clone() for name, x in tensors.items()}
    runs = [run_add(tensors, add_rms_norm, backend=backend) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


def test_bad_arguments() -> None:
    x, weight = torch.ones(4, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    bad: list[tuple[str, str, dict[str, Any]]] = [
        ("x_TD", "a tensor", {"x_TD": [1.0]}),
        ("x_TD", "2 dimensions", {"x_TD": x[0]}),
        ("x_TD", "torch.float32 or", {"x_TD": x.int()}),
        ("x_TD", "at least one column", {"x_TD": x[:, :0]}),
        ("x_TD", "stride 1", {"x_TD": torch.ones(8, 4, device=DEVICE).t()}),
        ("y_TD", "torch.float32", {"y_TD": x.bfloat16()}),
        ("y_TD", r"\[4, 8\]", {"y_TD": x[:3]}),
        ("y_TD", "the device of x_TD", {"y_TD": x.to("meta")}),
        ("weight_D", r"\[8\]", {"weight_D": weight[:4]}),
        ("weight_D", "torch.float32", {"weight_D": weight.half()}),
        ("eps", ">= 0", {"eps": -1.0}),
        ("alpha", "finite", {"alpha": float("inf")}),
        ("backend", "auto, triton, torch", {"backend": "cuda"}),
    ]
    good = {"x_TD": x, "y_TD": x, "alpha": 1.0, "weight_D": weight, "eps": EPS}
    for name, allowed, change in bad:
        with pytest.raises(KernelArgumentError, match=allowed) as caught:
            add_rms_norm(**(good | change))
        assert str(caught.value).startswith(f"{name}: got ") and "\n" not in str(caught.value)
    for width, dtype, allowed in ((8, torch.float64, "float16 with backend='triton'"), (16385, torch.float32, "16384")):
        x, weight = (torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((2, width), (width,)))
        with pytest.raises(KernelArgumentError, match=allowed):
            rms_norm(x, weight, EPS, backend="triton")
        assert torch.isfinite(rms_norm(x, weight, EPS)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(4099, 8192), (1031, 6144), (777, 16384), (5000, 1024), (300, 9001)])
def test_big_shapes(rows: int, width: int, dtype: torch.dtype) -> None:
    tensors = make(rows, width, dtype, torch.float32)
    assert_close(run_norm(tensors, rms_norm, backend="triton"), run_norm(doubles(tensors), naive_rms_norm), dtype)
    for uses in ("normed", "normed h"):
        got = run_add(tensors, add_rms_norm, uses, backend="triton")
        rounded = run_norm(doubles(tensors) | {"x": got["h"].double()}, naive_rms_norm)
        total = rounded["dx"] + (tensors["dh"].double() if "h" in uses.split() else 0)
        want = {"normed": rounded["normed"], "dx": ALPHA * total, "dy": total, "dweight": rounded["dweight"]}
        assert_close(got, want, dtype)

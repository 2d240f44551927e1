"""Products with int8 weights against float64, on every backend; without a GPU the kernel runs in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.int8_weights import (
    Int8Weight,
    columns,
    dequantise,
    eager,
    grouped_int8_mlp,
    int8_linear,
    launch,
    quantise,
    rows,
)
from tests.kernels.poison import fill_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "eager", "naive"]
LINEAR = [*BACKENDS, "dequantise"]
# Of the largest element of the result. Eager rounds a product, or a weight, to bfloat16 once more than the kernel does.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
KERNEL_BFLOAT16 = 4e-3 if DEVICE == "cuda" else 8e-3  # the interpreter cuts bits off where a GPU rounds
# Tokens, outputs, inputs: each launch shape, K split and not, widths that are no multiple of any block.
CASES = [(1, 70, 300), (1, 8, 33), (1, 130, 1100), (2, 70, 300), (2, 8, 33), (2, 130, 1100), (16, 64, 128),
         (17, 70, 300), (17, 130, 1100), (70, 70, 300), (150, 140, 200)]  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weight_of(*shape: int, grouped: bool, seed: int = 1) -> Int8Weight:
    """A weight whose rows and groups differ in size by far, so that another's scale shows."""
    factor = 2.0 ** torch.randint(
        -3, 4, (*shape[:-1], -(-shape[-1] // 128)), generator=torch.Generator().manual_seed(5)
    )
    spread = factor.repeat_interleave(128, -1)[..., : shape[-1]].to(DEVICE)
    return quantise(draw(*shape, seed=seed) * spread, grouped)


def exact(weight: Int8Weight) -> Tensor:
    """In float64, element by element."""
    groups = torch.arange(weight.values.shape[-1], device=DEVICE) // 128 if weight.scale.shape[-1] > 1 else None
    scale = weight.scale if groups is None else weight.scale[..., groups]
    return weight.values.double() * scale.double()


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest element; infinite where anything is no number."""
    assert found.shape == wanted.shape
    return float(((found.double() - wanted).abs().amax() / wanted.abs().amax()).nan_to_num(nan=torch.inf))


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), CASES)
def test_a_projection(tokens: int, outputs: int, inputs: int, grouped: bool, dtype: torch.dtype, backend: str) -> None:
    x, weight = draw(tokens, inputs, dtype=dtype), weight_of(outputs, inputs, grouped=grouped)
    y = int8_linear(x, weight, backend=backend)
    bound = KERNEL_BFLOAT16 if backend == "triton" and dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert y.dtype == dtype and error(y, x.double() @ exact(weight).T) < bound


def test_float64_on_the_paths_of_torch() -> None:
    x, weight = draw(3, 300).double(), weight_of(70, 300, grouped=True)
    for backend in ("auto", "eager", "naive"):
        assert error(int8_linear(x, weight, backend=backend), x @ exact(weight).T) < 1e-14


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", LINEAR)
@pytest.mark.parametrize("grouped", [False, True])
def test_parts_of_a_weight_give_the_parts_of_the_whole(grouped: bool, backend: str, tokens: int) -> None:
    x, weight = draw(tokens, 384), weight_of(96, 384, grouped=grouped)
    whole = x.double() @ exact(weight).T
    some = int8_linear(x, rows(weight, slice(32, 80)), backend=backend)
    assert error(some, whole[:, 32:80]) < 2e-6
    parts = [slice(0, 128), slice(128, 384)]
    summed = sum(int8_linear(x[:, part], columns(weight, part), backend=backend) for part in parts)
    assert error(summed, whole) < 2e-6


@pytest.mark.parametrize("backend", ["eager", "dequantise"])
def test_a_large_weight_is_taken_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(eager, "ELEMENTS", 1000)
    x, weight = draw(5, 300), weight_of(70, 300, grouped=False)
    assert error(int8_linear(x, weight, backend=backend), x.double() @ exact(weight).T) < 2e-6


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (9, 130), (8, 1024), (17, 2100)])
def test_a_weight_in_floats_is_that_of_torch(outputs: int, inputs: int, grouped: bool) -> None:
    weight = weight_of(outputs, inputs, grouped=grouped)
    assert torch.equal(launch.triton_dequantise(weight, torch.float32), dequantise(weight, torch.float32))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [launch.Shape(16, 32, 256, 4, 4), launch.Shape(32, 128, 64, 4, 3)])
def test_any_shape_and_number_of_parts(shape: launch.Shape, parts: int) -> None:
    x, weight = draw(17, 1100), weight_of(130, 1100, grouped=False)
    y = launch.triton_product(x, weight, shape=shape, parts=parts)
    assert error(y, x.double() @ exact(weight).T) < 2e-6


def test_k_is_split_for_few_outputs_and_whole_for_many() -> None:
    assert launch.split_k(64, 32, 132) == (4, 8)  # 4096 x 4096, 1 token: 64 programs alone
    assert launch.split_k(288, 48, 132) == (1, 48)
    assert launch.split_k(1, 9, 132) == (2, 5)  # no part has fewer than 4 blocks; the last is cut short
    for steps in range(1, 60):
        for programs in (1, 5, 40):
            splits, each = launch.split_k(programs, steps, 132)
            assert (splits - 1) * each < steps <= splits * each


EXPERTS, WIDTH, INNER = 5, 72, 40
ENDS = {
    "one token": [0, 0, 1, 1, 1],
    "17 tokens of one expert": [0, 17, 17, 17, 17],
    "some empty, rows unused": [3, 3, 20, 20, 41],
    "none": [0, 0, 0, 0, 0],
    "many": [70, 71, 71, 140, 150],
}


def plain_mlp(x: Tensor, w13: Tensor, w2: Tensor, ends: list[int]) -> Tensor:
    outputs = []
    for begin, end, (w1, w3), down in zip([0, *ends], ends, w13, w2, strict=False):
        hidden = F.silu(x[begin:end] @ w1.T) * (x[begin:end] @ w3.T)
        outputs.append(hidden @ down.T)
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_experts(ends: list[int], grouped: bool, dtype: torch.dtype, backend: str) -> None:
    width, inner = (272, 144) if grouped else (WIDTH, INNER)
    count = ends[-1] + 4
    x = draw(count, width, dtype=dtype)
    x[ends[-1] :] = float("nan")  # whoever reads it spoils the sums
    w13 = weight_of(EXPERTS, 2, inner, width, grouped=grouped)
    w2 = weight_of(EXPERTS, width, inner, grouped=grouped, seed=2)
    offset = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    y = grouped_int8_mlp(x, w13, w2, offset, backend=backend)
    assert y.dtype == dtype and y.shape == x.shape
    if ends[-1]:
        wanted = plain_mlp(x.double(), exact(w13), exact(w2), ends)
        assert error(y[: ends[-1]], wanted) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    if backend == "triton":
        assert y[ends[-1] :].isnan().all(), "rows of nobody were written"


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda x, w: (x[0], w), "x_TD"),
        (lambda x, w: (x.half(), w), "x_TD"),
        (lambda x, w: (x[:, ::2], w), "x_TD"),
        (lambda x, w: (x[:, :-1], w), "weight_ED.values"),
        (lambda x, w: (x, w.values), "weight_ED"),
        (lambda x, w: (x, Int8Weight(w.values.float(), w.scale)), "weight_ED.values"),
        (lambda x, w: (x, Int8Weight(w.values, w.scale.bfloat16())), "weight_ED.scale"),
        (lambda x, w: (x, Int8Weight(w.values, w.scale[:-1])), "weight_ED.scale"),
        (lambda x, w: (x, Int8Weight(w.values, w.scale[:, :2])), "weight_ED.scale"),
        (lambda x, w: (x, Int8Weight(w.values, w.scale.to("meta"))), "weight_ED.scale"),
        (lambda x, w: (x.clone().requires_grad_(), w), "x_TD"),
    ],
)
def test_arguments_that_do_not_fit(change: object, argument: str) -> None:
    x, weight = draw(3, 300), weight_of(8, 300, grouped=True)
    with pytest.raises(KernelArgumentError) as caught:
        int8_linear(*change(x, weight))
    assert caught.value.argument == argument


def test_experts_that_do_not_fit() -> None:
    w13, w2 = weight_of(3, 2, 8, 16, grouped=False), weight_of(3, 16, 8, grouped=False)
    x, offset = draw(4, 16), torch.tensor([1, 2, 4], dtype=torch.int32, device=DEVICE)
    for bad, argument in (
        ((x[:, :8], w13, w2, offset), "w13_E2FD.values"),
        ((x, w13, w13, offset), "w2_EDF.values"),
        ((x, w13, weight_of(3, 16, 4, grouped=False), offset), "w2_EDF.values"),
        ((x, w13, w2, offset.long()), "offset_E"),
        ((x, w13, w2, offset[:2]), "offset_E"),
    ):
        with pytest.raises(KernelArgumentError) as caught:
            grouped_int8_mlp(*bad)
        assert caught.value.argument == argument
    with pytest.raises(KernelArgumentError, match="backend"):
        grouped_int8_mlp(x, w13, w2, offset, backend="cutlass")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 4096])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_projection_of_hybrid_7b_on_a_gpu(tokens: int, grouped: bool) -> None:
    x, weight = draw(tokens, 4096, dtype=torch.bfloat16), weight_of(12288, 4096, grouped=grouped)
    wanted = x.double() @ exact(weight).T
    assert error(int8_linear(x, weight, backend="triton"), wanted) < KERNEL_BFLOAT16
    assert error(int8_linear(x, weight), wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_offsets_of_a_weight_and_of_rows_pass_2_to_the_31_on_a_gpu() -> None:
    experts, width, inner = 32, 6144, 9216  # 3.6 G elements, those of a layer of the released model
    w13 = Int8Weight(torch.ones(experts, 2, inner, width, dtype=torch.int8, device=DEVICE),
                     torch.full((experts, 2, inner, 1), 1e-3, device=DEVICE))  # fmt: skip
    w13.values[-1, :, -1] = 2
    first = Int8Weight(w13.values.flatten(1, 2), w13.scale.flatten(1, 2))
    offset = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    offset[-1] = 3
    x = torch.ones(3, width, dtype=torch.bfloat16, device=DEVICE)
    y = launch.triton_product(x, first, offset)
    assert y[2, -1] == 12.3125 and y[2, 0] == 6.15625  # 2 and 1 times 6.144, in bfloat16
    many = torch.ones(400_000, width, dtype=torch.bfloat16, device=DEVICE)
    narrow = Int8Weight(w13.values[0, 0, :64], w13.scale[0, 0, :64])
    assert launch.triton_product(many, narrow)[-1, -1] == 6.15625

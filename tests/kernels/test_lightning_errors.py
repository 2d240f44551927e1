"""Every argument that does not fit is refused, in one line, by name, before any work."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from mmkernels import KernelArgumentError, lightning_attention, lightning_decode_step


def good() -> dict[str, Any]:
    """Arguments that pass: 1 row, 6 tokens, 2 heads, widths 4 and 3."""
    return {
        "q_BTHD": torch.randn(1, 6, 2, 4),
        "k_BTHD": torch.randn(1, 6, 2, 4),
        "v_BTHD": torch.randn(1, 6, 2, 3),
        "slopes_H": torch.tensor([0.5, 0.1]),
    }


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("q_BTHD", "a tensor", {"q_BTHD": [1.0]}),
    ("q_BTHD", "4 dimensions", {"q_BTHD": torch.randn(6, 2, 4)}),
    ("q_BTHD", "float32, bfloat16, float16 or float64", {"q_BTHD": torch.ones(1, 6, 2, 4, dtype=torch.int64)}),
    ("k_BTHD", "the dtype of q_BTHD", {"k_BTHD": torch.randn(1, 6, 2, 4).bfloat16()}),
    ("k_BTHD", r"\[1, 6, 2, 4\]", {"k_BTHD": torch.randn(1, 5, 2, 4)}),
    ("k_BTHD", "the device of q_BTHD", {"k_BTHD": torch.randn(1, 6, 2, 4, device="meta")}),
    ("v_BTHD", "the last dimension", {"v_BTHD": torch.randn(1, 6, 3, 3)}),
    ("slopes_H", r"\[2\]", {"slopes_H": torch.rand(3)}),
    ("slopes_H", "1 dimensions", {"slopes_H": torch.rand(2, 1)}),
    ("slopes_H", "float32 or float64", {"slopes_H": torch.rand(2).half()}),
    ("slopes_H", "slopes >= 0", {"slopes_H": torch.tensor([0.5, -0.1])}),
    ("slopes_H", "finite", {"slopes_H": torch.tensor([0.5, float("nan")])}),
    ("slopes_H", "finite", {"slopes_H": torch.tensor([0.5, float("inf")])}),
    ("slopes_H", "without gradient", {"slopes_H": torch.rand(2, requires_grad=True)}),
    ("slopes_H", "the device of q", {"slopes_H": torch.rand(2, device="meta")}),
    ("cu_seqlens", "int32 or int64", {"cu_seqlens": torch.tensor([0.0, 6.0])}),
    ("cu_seqlens", "a tensor", {"cu_seqlens": [0, 6]}),
    ("cu_seqlens", "1 dimensions", {"cu_seqlens": offsets(0, 6)[None]}),
    ("cu_seqlens", "at least one document", {"cu_seqlens": offsets(0)}),
    ("cu_seqlens", "allowed: 0", {"cu_seqlens": offsets(1, 6)}),
    ("cu_seqlens", "T = 6", {"cu_seqlens": offsets(0, 5)}),
    ("cu_seqlens", "T = 6", {"cu_seqlens": offsets(0, 7)}),
    ("cu_seqlens", "never decrease", {"cu_seqlens": offsets(0, 4, 3, 6)}),
    ("cu_seqlens", "the device of q", {"cu_seqlens": offsets(0, 6).to("meta")}),
    ("initial_state", r"\[1, 2, 4, 3\]", {"initial_state": torch.zeros(2, 2, 4, 3)}),
    ("initial_state", "4 dimensions", {"initial_state": torch.zeros(2, 4, 3)}),
    (
        "initial_state",
        r"\[2, 2, 4, 3\]",
        {"initial_state": torch.zeros(1, 2, 4, 3), "cu_seqlens": offsets(0, 2, 6)},
    ),
    ("initial_state", "float32 for inputs", {"initial_state": torch.zeros(1, 2, 4, 3).bfloat16()}),
    ("initial_state", "the device of q", {"initial_state": torch.zeros(1, 2, 4, 3, device="meta")}),
    ("backend", "auto, triton, chunked, naive", {"backend": "chunky"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD)])
def test_bad_argument(name: str, allowed: str, change: dict[str, Any]) -> None:
    with pytest.raises(KernelArgumentError, match=allowed) as caught:
        lightning_attention(**(good() | change))
    message = str(caught.value)
    assert message.startswith(f"{name}: got ") and "\n" not in message


def test_packed_needs_batch_one() -> None:
    arguments = {name: x.expand(2, -1, -1, -1) if x.ndim == 4 else x for name, x in good().items()}
    with pytest.raises(KernelArgumentError, match="batch 2"):
        lightning_attention(**arguments, cu_seqlens=offsets(0, 6))


def test_good_arguments_pass() -> None:
    for dtype in (torch.int32, torch.int64):
        o, final = lightning_attention(**good(), cu_seqlens=offsets(0, 2, 2, 6, dtype=dtype), check_values=True)
        assert o.shape == (1, 6, 2, 3) and final is None


def test_value_checks_can_be_switched_off() -> None:
    arguments = good() | {"slopes_H": torch.tensor([0.5, -0.1])}
    lightning_attention(**arguments, check_values=False)


def test_decode_arguments() -> None:
    step = [torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 3), torch.rand(2), torch.zeros(1, 2, 4, 3)]
    lightning_decode_step(*step)
    for at, name, bad in (
        (1, "k_BHD", torch.randn(1, 2, 5)),
        (2, "v_BHD", torch.randn(2, 2, 3)),
        (3, "slopes_H", torch.rand(4)),
        (4, "state_BHDE", torch.zeros(1, 2, 3, 4)),
    ):
        with pytest.raises(KernelArgumentError, match=f"^{name}: "):
            lightning_decode_step(*step[:at], bad, *step[at + 1 :])


def test_the_error_is_a_value_error_and_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(KernelArgumentError("x", 1, "2")))
    assert isinstance(error, ValueError) and error.argument == "x" and str(error) == "x: got 1; allowed: 2"

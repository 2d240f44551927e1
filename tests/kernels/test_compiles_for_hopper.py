"""What the interpreter cannot see: every kernel compiles for an H100, fits its shared memory and loads 16 bytes."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
SHARED_BYTES = 232448
"""What one program may have on an H100."""
# Kernels that stream rows or states: anything narrower than 16 bytes costs them their bandwidth.
STREAMING = [
    "common.weight_sums.norm_weight_sums_kernel",
    "cross_entropy.kernels.cross_entropy_gradient_kernel",
    "cross_entropy.kernels.cross_entropy_statistics_kernel",
    "embedding.kernels.embedding_add_rows_kernel",
    "int8_weights.kernels.int8_dequantise_kernel",
    "int8_weights.kernels.int8_join_kernel",
    "int8_weights.kernels.int8_product_kernel",
    "int8_weights.kernels.int8_row_kernel",
    "largest.kernels.largest_part_kernel",
    "lightning.triton.decode_kernel.lightning_decode_kernel",
    "moe.permute.kernels.unpermute_gather_kernel",
    "moe.permute.kernels.permute_kernel",
    "moe.permute.kernels.unpermute_grad_kernel",
    "norm.kernels.rms_norm_backward_kernel",
    "norm.kernels.rms_norm_forward_kernel",
    "norm_gate.kernels.norm_gate_backward_kernel",
    "norm_gate.kernels.norm_gate_forward_kernel",
    "rope.kernels.rope_kernel",
    "router.kernels.router_input_grad_kernel",
    "router.kernels.router_logits_kernel",
    "router.kernels.router_weight_grad_kernel",
    "softmax.merge_kernel.softmax_merge_kernel",
    "softmax.paged_kernel.paged_join_kernel",
    "softmax.paged_kernel.paged_step_kernel",
    "swiglu.kernels.swiglu_backward_kernel",
    "swiglu.kernels.swiglu_forward_kernel",
]


CONSTANTS = ("tl.constexpr", "gl.constexpr")
JIT = ("triton.jit", "gluon.jit")


def jit_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every `@triton.jit` and `@gluon.jit` function of the package, by its full name."""
    for path in sorted((KERNELS / "mmkernels").rglob("*.py")):
        module = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                jit in ast.unparse(d) for d in node.decorator_list for jit in JIT
            ):
                yield f"{module}.{node.name}", node


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Name, shared memory and wide loads of every kernel that `hopper_compile.py` compiles, with an empty cache."""
    pytest.importorskip("triton")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("Triton's compiler for NVIDIA comes with its wheels for x86-64 Linux")
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(KERNELS), env.get("PYTHONPATH")])),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    script = Path(__file__).with_name("hopper_compile.py")
    made = []
    with ThreadPoolExecutor() as both:
        for done in both.map(
            lambda part: subprocess.run([sys.executable, script, part], env=env, capture_output=True, text=True),
            ("hopper", "rest"),
        ):
            assert done.returncode == 0, done.stderr[-4000:]
            made += [json.loads(line) for line in done.stdout.splitlines()]
    return made


@pytest.mark.slow  # a minute and a half of two cores
def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    entries = {name for name, _ in jit_functions() if name.endswith("_kernel")}
    assert len(entries) > 15 and {made["kernel"] for made in compiled} == entries


@pytest.mark.slow
def test_shared_memory(compiled: list[dict[str, Any]]) -> None:
    assert [made for made in compiled if made["shared"] > SHARED_BYTES] == []


@pytest.mark.slow
def test_products_overlap(compiled: list[dict[str, Any]]) -> None:
    """Else a kernel for Hopper runs at half its speed, and nobody is told."""
    assert [made["kernel"] for made in compiled if made["serialised"]] == []


@pytest.mark.slow
def test_rows_of_other_lengths_compile_nothing_new(compiled: list[dict[str, Any]]) -> None:
    """Softmax attention for two shapes of heads; gradients of keys once more, for parts in float32."""
    made = Counter(made["hash"] for made in compiled if "softmax.hopper" in made["kernel"])
    kernels = Counter(kernel for kernel, _ in {(x["kernel"], x["hash"]) for x in compiled if x["hash"] in made})
    assert sorted(kernels.values()) == [2, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", STREAMING)
def test_loads_of_16_bytes(compiled: list[dict[str, Any]], kernel: str) -> None:
    wide = [made["wide_loads"] for made in compiled if made["kernel"] == f"mmkernels.{kernel}"]
    assert wide and min(wide) > 0


def test_annotations() -> None:
    """Triton reads them: it does not specialise an argument annotated `int`, even a stride of 1."""
    for name, node in jit_functions():
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            assert arg.annotation is None or ast.unparse(arg.annotation) in CONSTANTS, f"{name}: {arg.arg}"

"""Launch shapes of the int8 product on one GPU, and the tokens from which a weight is dequantised first, as JSON.

    PYTHONPATH=kernels python kernels/bench/gpu/int8_shapes.py --out shapes.json [--tokens 1,16,64,256,512,1024]
        [--products qkv,out] [--seconds 150]

For each product and number of tokens: every shape that holds the tokens, with K cut into 1, 2, 4 and 8 parts, against
what `launch.py` takes now, the dequantised product and torch's in bfloat16. The best is printed as it is found; a new
shape is compiled first, which takes about a second, so that `--seconds` ends the sweep between two of them.
`--device cpu` tries the script out in Triton's interpreter on small widths; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu import machine  # noqa: E402
from bench.gpu.int8_products import PROJECTIONS, SMALL, attempt, host_timer, rows_of  # noqa: E402
from mmkernels.int8_weights import Int8Weight, dequantise, empty_int8, int8_linear, quantise_into  # noqa: E402
from mmkernels.int8_weights.launch import Shape, cut, triton_product  # noqa: E402

Timer = Callable[[Callable[[], Tensor]], float]
PARTS = (1, 2, 4, 8)
# Rows of outputs, columns, warps and loads under way: narrow ones for many programs, deep ones for the bandwidth.
BLOCKS = ((64, 128, 4, 4), (64, 256, 4, 3), (32, 256, 4, 4), (32, 128, 2, 6), (128, 128, 4, 3), (128, 128, 8, 4),
          (64, 128, 4, 6), (128, 64, 4, 5), (16, 256, 2, 5))  # fmt: skip
ROWS = (16, 32, 64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="1,16,64,256,512,1024")
    parser.add_argument("--products", default=",".join(PROJECTIONS))
    parser.add_argument("--grouped", action="store_true", help="a scale for every 128 columns")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no shape is begun")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    cuda = device.type == "cuda"
    timer = machine.gpu_timer(True) if cuda else host_timer
    until, rows = time.monotonic() + given.seconds, []
    for tokens in (int(word) for word in given.tokens.split(",")):
        for name in given.products.split(","):
            outputs, inputs = (size // (1 if cuda else SMALL) for size in PROJECTIONS[name])
            label = {"product": name, "outputs": outputs, "inputs": inputs, "tokens": tokens, "grouped": given.grouped}
            rows.append(label | sweep(tokens, _weight(outputs, inputs, given.grouped, device), timer, until))
            given.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "all"}), flush=True)
    return 0


def sweep(tokens: int, weight: Int8Weight, timer: Timer, until: float) -> dict[str, Any]:
    """Milliseconds of the ways that there are, and of the shapes that there was time for, the best first."""
    plain, x = dequantise(weight, torch.bfloat16), rows_of(tokens, weight.values.shape[1], weight.values.device)
    found: dict[str, Any] = {
        "now_ms": attempt(timer, lambda: int8_linear(x, weight, backend="triton")),
        "dequantise_ms": attempt(timer, lambda: int8_linear(x, weight, backend="dequantise")),
        "bf16_matmul_ms": attempt(timer, lambda: x @ plain.t()),
    }
    timed, failed = [], 0
    for shape, parts in candidates(tokens, weight):
        if time.monotonic() > until:
            break
        ms = attempt(timer, lambda shape=shape, parts=parts: triton_product(x, weight, shape=shape, parts=parts))
        if isinstance(ms, float):
            timed.append((ms, [*shape], parts))
        else:  # more registers or shared memory than there are
            failed += 1
    timed.sort()
    best = {"best_ms": timed[0][0], "best_shape": timed[0][1], "best_parts": timed[0][2]} if timed else {}
    return found | best | {"tried": len(timed), "failed": failed, "all": timed}


def candidates(tokens: int, weight: Int8Weight) -> Iterator[tuple[Shape, int]]:
    """Shapes and parts of K: none twice, and no part of fewer than two blocks."""
    block_m = next((rows for rows in ROWS if tokens <= rows), ROWS[-1])
    for block_n, block_k, warps, stages in BLOCKS:
        if weight.scale.shape[1] > 1 and block_k > 128:  # a block's columns share a scale
            continue
        steps, seen = triton.cdiv(weight.values.shape[1], block_k), set()
        for parts in PARTS:
            made, each = cut(steps, parts)
            if made not in seen and (made == 1 or each >= 2):
                seen.add(made)
                yield Shape(block_m, block_n, block_k, warps, stages), made


def _weight(outputs: int, inputs: int, grouped: bool, device: torch.device) -> Int8Weight:
    weight = empty_int8((outputs, inputs), grouped, device)
    quantise_into(weight, torch.randn(outputs, inputs, device=device))
    return weight


if __name__ == "__main__":
    sys.exit(main())

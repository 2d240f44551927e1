"""Products with int8 weights on one GPU beside the bandwidth floor and torch's product in bfloat16, as JSON.

    PYTHONPATH=kernels python kernels/bench/gpu/int8_products.py --out int8.json [--tokens 1,16,64,4096] [--quick]

Projections of `hybrid_7b` and the experts of the released model (those of one of 8 GPUs). Each figure is written as it
comes. Floors: weights, scales, input and output once at the bandwidth of a large copy, measured in the same run.
`--device cpu --quick` tries the script out on small shapes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu import machine  # noqa: E402
from mmkernels.grouped_mlp import grouped_mlp  # noqa: E402
from mmkernels.int8_weights import dequantise, empty_int8, grouped_int8_mlp, int8_linear, quantise_into  # noqa: E402

PROJECTIONS = {"qkv": (12288, 4096), "out": (4096, 4096), "gate_up": (22528, 4096), "down": (4096, 11264)}
EXPERTS = (4, 9216, 6144)  # experts, width inside one, model width
SMALL = 64  # widths are cut to so many times fewer with --quick on a CPU


class Case(NamedTuple):
    """A product to be timed.

    Attributes:
        label: what it is.
        calls: by name; the first is ours as it is dispatched.
        floor_bytes: that must be moved.
    """

    label: dict[str, Any]
    calls: dict[str, Callable[[], Tensor]]
    floor_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="1,16,64,4096")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    cuda = device.type == "cuda"
    timer = machine.gpu_timer(given.quick) if cuda else host_timer
    gbps = machine.copy_gbps(machine.launched_timer(given.quick)) if cuda else 1.0
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "versions": machine.versions(),
        "copy_gbps": gbps,
        "rows": [],
    }
    for case in cases([int(word) for word in given.tokens.split(",")], device, 1 if cuda else SMALL):
        row = case.label | {"floor_ms": case.floor_bytes / gbps / 1e6}
        for name, call in case.calls.items():
            row[f"{name}_ms"] = attempt(timer, call)
        if isinstance(row["auto_ms"], float):
            row["of_floor"] = row["floor_ms"] / row["auto_ms"]
        found["rows"].append(row)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    return 0


def cases(tokens: list[int], device: torch.device, smaller: int) -> Iterator[Case]:
    """Yield the products, each with its tensors made afresh."""
    for grouped in (False, True):
        for name, (outputs, inputs) in PROJECTIONS.items():
            for count in tokens:
                yield projection(name, outputs // smaller, inputs // smaller, count, grouped, device)
        for count in tokens:
            yield experts(*EXPERTS, count, grouped, device, smaller)


def projection(name: str, outputs: int, inputs: int, tokens: int, grouped: bool, device: torch.device) -> Case:
    """A projection of so many tokens."""
    weight = empty_int8((outputs, inputs), grouped, device)
    quantise_into(weight, torch.randn(outputs, inputs, device=device))
    plain, x = dequantise(weight, torch.bfloat16), rows_of(tokens, inputs, device)
    calls = {"auto": lambda: int8_linear(x, weight), "eager": lambda: int8_linear(x, weight, backend="eager"),
             "bf16_matmul": lambda: x @ plain.t()}  # fmt: skip
    if device.type == "cuda":
        calls["triton"] = lambda: int8_linear(x, weight, backend="triton")
    label = {"product": name, "outputs": outputs, "inputs": inputs, "tokens": tokens, "grouped": grouped}
    return Case(label, calls, weight.nbytes + 2 * tokens * (outputs + inputs))


def experts(count: int, inner: int, width: int, rows: int, grouped: bool, device: torch.device, smaller: int) -> Case:
    """Experts' MLPs of so many rows, shared out evenly; of few rows some experts get none."""
    inner, width = inner // smaller, width // smaller
    w13, w2 = empty_int8((count, 2, inner, width), grouped, device), empty_int8((count, width, inner), grouped, device)
    for weight in (w13, w2):
        for expert in range(count):
            part = type(weight)(weight.values[expert], weight.scale[expert])
            quantise_into(part, torch.randn(part.values.shape, device=device))
    plain13, plain2 = dequantise(w13, torch.bfloat16), dequantise(w2, torch.bfloat16)
    ends = [(e + 1) * rows // count for e in range(count)]
    offset, x = torch.tensor(ends, dtype=torch.int32, device=device), rows_of(rows, width, device)
    calls = {"auto": lambda: grouped_int8_mlp(x, w13, w2, offset),
             "bf16_grouped": lambda: grouped_mlp(x, plain13, plain2, offset)}  # fmt: skip
    busy = sum(end > begin for begin, end in zip([0, *ends], ends, strict=False))
    label = {"product": "experts", "outputs": inner, "inputs": width, "tokens": rows, "grouped": grouped, "busy": busy}
    weights = (w13.nbytes + w2.nbytes) * busy // count
    return Case(label, calls, weights + 2 * rows * (2 * width + 6 * inner))


def rows_of(count: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(count, width, device=device).bfloat16()


def attempt(timer: Callable[[Callable[[], Tensor]], float], call: Callable[[], Tensor]) -> float | str:
    """Milliseconds, or the name of what went wrong: the other figures are still wanted."""
    try:
        return timer(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def host_timer(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())

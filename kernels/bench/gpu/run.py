"""Every kernel on one GPU beside its peers and its floor: a table, its JSON and a plot.

    PYTHONPATH=kernels python kernels/bench/gpu/run.py [--out FOLDER] [--only lightning,decode] [--quick]

Peers and floors are measured in the same run on the same tensors. flash-linear-attention is a peer if it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run as a script, this folder comes first in sys.path, where `lightning` and others would hide packages of that name.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import torch  # noqa: E402

from bench.gpu import (  # noqa: E402
    cross_entropy,
    curve,
    decode,
    errors,
    layer,
    lightning,
    lightning_chunks,
    machine,
    million,
    moe,
    norms,
    peers,
    plot,
    report,
    softmax,
    tuning,
)
from bench.gpu.harness import Bench  # noqa: E402
from bench.gpu.table import tidy  # noqa: E402

GROUPS: dict[str, Callable[[Bench], None]] = {
    "lightning": lightning.long_rows,
    "few_heads": lightning.few_heads,
    "varlen": lightning.varlen,
    "short": lightning.short_rows,
    "chunks": lightning_chunks.chunks,
    "million": million.million,
    "layer": layer.layer,
    "softmax": softmax.softmax,
    "errors": errors.errors,
    "curve": curve.curve,
    "decode": decode.decode,
    "paged": decode.paged,
    "moe": moe.moe,
    "swiglu": moe.activation,
    "norms": norms.norms,
    "loss": cross_entropy.cross_entropy,
}
TUNED = GROUPS.keys() - {"chunks", "decode", "moe", "swiglu", "norms", "softmax", "loss"}
"""Groups in which FLA's chunked kernels run."""
QUICK_LIMIT = 32768


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the files (%(default)s)")
    parser.add_argument("--only", type=_groups, default=list(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="up to 32K tokens, few repetitions")
    parser.add_argument("--note", default="", help="a sentence for the report: what else was run on this machine")
    return parser.parse_args(arguments)


def _groups(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not among {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in names]


def measure(bench: Bench, names: list[str], result: dict[str, Any], path: Path) -> None:
    """Run the groups in order; the files grow with each."""
    begin = time.perf_counter()
    steps = {name: GROUPS[name] for name in names}
    if TUNED & steps.keys():
        steps = {"tuning of FLA": peers.tune_fla, **steps}
    for name, group in steps.items():
        start = time.perf_counter()
        try:
            group(bench)
        except Exception as error:  # a group's own loop: the others still run
            bench.note(name, error)
        now = time.perf_counter()
        result["group_seconds"][name] = round(now - start, 1)
        result["seconds"] = round(now - begin, 1)
        result["rows"], result["errors"] = [row.as_dict() for row in bench.rows], bench.errors
        report.write(result, path)
        print(f"{name}: {now - start:.1f} s", file=sys.stderr, flush=True)


def start(args: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """Measure the machine; the bench, and the result without rows."""
    timer, launched = machine.gpu_timer(args.quick), machine.launched_timer(args.quick)
    copy, matmul = machine.copy_gbps(launched), machine.matmul_tflops(launched)
    limit = QUICK_LIMIT if args.quick else None
    device = torch.cuda.get_device_name()
    result = {
        "device": device,
        "gpu": machine.short_name(device),
        "date": datetime.date.today().isoformat(),
        "versions": machine.versions(),
        "fla_missing": peers.missing_fla(),
        "copy_gbps": tidy(copy),
        "matmul_tflops": tidy(matmul),
        "quick": args.quick,
        "note": args.note,
        "groups": args.only,
        "group_seconds": {},
    }
    return Bench(torch.device("cuda"), copy, timer, launched, machine.compiled, limit), result


def main(arguments: list[str] | None = None) -> int:
    """0 when the table was measured, whatever it says; 2 without a GPU."""
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("error: this bench needs an NVIDIA GPU, and torch.cuda finds none here.", file=sys.stderr)
        return 2
    tuning.compile_configurations_together()
    bench, result = start(args)
    stem = report.file_stem(result["date"], result["gpu"], args.quick, args.only != list(GROUPS))
    path = args.out / stem
    measure(bench, args.only, result, path)
    try:
        plot.draw(result, path.with_name(f"{stem}.png"))
    except Exception as error:
        bench.note("plot", error)
    print(report.markdown(result))
    print(f"written: {path}.json, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
r"""Context parallelism on several GPUs: attention of both kinds, its planning, and whole steps, beside its peers.

    torchrun --standalone --nproc-per-node 4 -m mmtrain.bench.context_gpu --out FOLDER
    torchrun --standalone --nproc-per-node 2 -m mmtrain.bench.context_gpu --out FOLDER --only softmax --tables balanced
    torchrun --standalone --nproc-per-node 2 -m mmtrain.bench.context_gpu --out FOLDER --only step \
        --step-cases 131072:2:1,1048576:0:0

All GPUs share each row. Medians, of the slowest rank. What fails, or finds no time left, is a row that says so.
`context-N.json` and `.md` are written after each measurement; a later run with `--only` replaces the parts that it
measures. The part step measures the rates of kernels first, the part rates, and says what they make its steps expect.
"""

from __future__ import annotations

import argparse
import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mmtrain.bench.context_cases import FORM, crossed, step_cases
from mmtrain.bench.context_lightning import measure_lightning
from mmtrain.bench.context_moving import measure_moving
from mmtrain.bench.context_planning import measure_planning
from mmtrain.bench.context_report import Bench
from mmtrain.bench.context_softmax import TABLES, Heads, measure_softmax
from mmtrain.bench.context_step import measure_step
from mmtrain.config import ClusterConfig, ModelConfig, ParallelConfig
from mmtrain.config.cli import compose
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HEADS = Heads(64, 8, 128, torch.bfloat16)
LAYER = ModelConfig("lightning", vocab_size=256, hidden_size=6144, num_layers=80, num_heads=64, num_kv_heads=8,
                    head_dim=128, ffn_hidden_size=256)  # fmt: skip
SMOKE_HEADS = Heads(8, 4, 8, torch.float32)
SMOKE = ModelConfig("smoke", vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                    ffn_hidden_size=32, layer_pattern="LS", rotary_dim=4, num_experts=0)  # fmt: skip


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(part) for part in text.split(",")]


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `--smoke` makes everything tiny."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", default="planning,softmax,lightning,moving,step,softmax_long", help="parts, in this order"
    )
    parser.add_argument("--softmax-tokens", type=numbers, default="8192,65536", help="tokens a GPU")
    parser.add_argument("--long-tokens", type=numbers, default="131072", help="tokens a GPU of softmax_long")
    parser.add_argument("--tables", default=",".join(TABLES), help="of the part softmax")
    parser.add_argument("--lightning-tokens", type=numbers, default="4096,16384,65536", help="tokens a GPU")
    parser.add_argument("--step-tokens", type=numbers, help="tokens a row (131072,262144)")
    parser.add_argument("--step-rows", type=numbers, help="rows of documents (3); 0 for a single document")
    parser.add_argument("--step-first", type=int, default=0, help="number of the first row, which draws its documents")
    parser.add_argument("--step-warm", type=numbers, help="1 (as if not given) or 0 for each: the same steps before")
    parser.add_argument("--step-cases", type=step_cases, metavar=f"{FORM},...", help="in place of these three")
    parser.add_argument("--step-tables", default="zigzag,balanced", help="of the part step")
    parser.add_argument("--model", default="hybrid_410m", help="of the part step: a file of configs/model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="of model or parallel, in step"
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="of the repetitions of one measurement")
    parser.add_argument("--limit", type=float, default=125.0, help="seconds, after which nothing more is begun")
    parser.add_argument("--trace", type=int, default=0, metavar="TOKENS", help="draw the lightning layer's timeline")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.softmax_tokens, options.long_tokens, options.lightning_tokens = [64], [128], [64]
        options.seconds = 0.0
    _set_step_cases(parser, options)
    return options


def _set_step_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the cases of the part step: those that are given, or each length with each number of rows."""
    lists = {"--step-tokens": options.step_tokens, "--step-rows": options.step_rows, "--step-warm": options.step_warm}
    if options.step_cases is not None:
        if both := [name for name, values in lists.items() if values is not None]:
            parser.error(f"argument --step-cases: stands in place of {both[0]}: give one of them")
        return
    tokens = [128] if options.smoke else options.step_tokens or [131072, 262144]
    try:
        options.step_cases = crossed(tokens, options.step_rows or [3], options.step_warm or [1])
    except ValueError as error:
        parser.error(str(error))


def parts(
    bench: Bench, options: argparse.Namespace, model: ModelConfig, parallel: ParallelConfig
) -> dict[str, Callable]:
    """What measures each part."""
    heads, layer = (SMOKE_HEADS, SMOKE) if options.smoke else (HEADS, LAYER)
    tables, dtype = options.tables.split(","), heads.dtype
    rows = [("128K", 2**17), ("1M", 2**20)][: 1 if options.smoke else 2]
    ranks, repeats = ([2], 2) if options.smoke else ([4, 8, 16], 10)
    return {
        "planning": lambda: measure_planning(bench, rows, ranks, repeats),
        "softmax": lambda: measure_softmax(bench, "softmax", heads, options.softmax_tokens, tables),
        "lightning": lambda: measure_lightning(bench, layer, dtype, options.lightning_tokens, options.trace),
        "moving": lambda: measure_moving(bench, layer.hidden_size, dtype, options.lightning_tokens),
        "step": lambda: measure_step(
            bench,
            model,
            parallel,
            options.step_cases,
            options.step_tables.split(","),
            options.step_first,
        ),
        "softmax_long": lambda: measure_softmax(bench, "softmax_long", heads, options.long_tokens, ["balanced"]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that are asked for; each is written when it is done."""
    options = read_options(arguments)
    warnings.simplefilter("ignore")
    world = mesh.world_size()
    parallel = ParallelConfig(cp=world, activation_checkpoint=True)
    model = SMOKE
    if not options.smoke:
        given = [f"model={options.model}", f"parallel.cp={world}", "parallel.activation_checkpoint=true", *options.set]
        config = compose([*given, "run.name=bench", "data.path=none"], CONFIGS)
        model, parallel = config.model, config.parallel
    layout = plan_layout(world, parallel, model, sorted({case.tokens for case in options.step_cases}))
    context = mesh.start(ClusterConfig(device="cpu" if options.smoke else "cuda", timeout_minutes=3), layout)
    try:
        dist.all_reduce(torch.zeros(1, device=context.device), group=context.dense["cp"].get_group())  # connects them
        bench = Bench(context, options.out, title_of(context), options.seconds, options.limit)
        measures = parts(bench, options, model, parallel)
        for name in options.only.split(","):
            try:
                measures[name]()
            except Exception:  # outside of a measurement; those keep theirs in their rows
                traceback.print_exc()
    finally:
        mesh.stop()


def title_of(context: mesh.ParallelContext) -> str:
    """Machine, versions and date."""
    on_gpu = context.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU processes"
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if on_gpu else ""
    return (f"Context parallelism on {dist.get_world_size()} {name}, torch {torch.__version__}{nccl}, "
            f"{datetime.date.today().isoformat()}; medians of the slowest rank.")  # fmt: skip


if __name__ == "__main__":
    main()

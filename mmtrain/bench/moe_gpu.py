#!/usr/bin/env python
"""An MoE layer over several GPUs, forward and backward, beside megatron-core's in the same run.

    torchrun --nproc-per-node 4 -m mmtrain.bench.moe_gpu --ep 4 --out FOLDER
    torchrun --nproc-per-node 4 -m mmtrain.bench.moe_gpu --ep 2 --etp 2 --tp 2 --out FOLDER

32 experts, top-2, capacity factor 1.25, bf16. Useful operations are those of the assignments before any is dropped, so
that both layers are judged by the same count. Medians of rank 0, whose steps the collectives tie to the others'.
"""

from __future__ import annotations

import argparse
import datetime
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn

from mmtrain.bench.peer_moe import megatron_moe
from mmtrain.bench.timeline import record
from mmtrain.bench.timing import timed
from mmtrain.config import ClusterConfig, ModelConfig, ParallelConfig
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.router import RoutingScope
from mmtrain.parallel import mesh
from mmtrain.parallel.expert.exchange import ExpertExchange, build_exchange
from mmtrain.parallel.layout import Layout, plan_layout
from mmtrain.parallel.routing import FullMicroBatch

EXPERTS, TOP_K, CAPACITY = 32, 2, 1.25
PEER = "megatron-core"


@dataclass(frozen=True)
class Shape:
    """Widths of a layer, and the tokens of a micro-batch."""

    hidden: int
    ffn: int
    tokens: int


SHAPES = {"large": Shape(6144, 9216, 8192), "small": Shape(2048, 1408, 16384)}


def model_config(shape: Shape) -> ModelConfig:
    """A model whose layers have this mixture of experts."""
    return ModelConfig("moe", vocab_size=256, hidden_size=shape.hidden, num_layers=8, num_heads=shape.hidden // 128,
                       num_kv_heads=8, head_dim=128, ffn_hidden_size=shape.ffn, num_experts=EXPERTS, top_k=TOP_K,
                       rotary_dim=64, capacity_factor=CAPACITY)  # fmt: skip


def our_moe(
    shape: Shape, context: mesh.ParallelContext, groups: int, exchange: str = "auto"
) -> tuple[nn.Module, ExpertExchange]:
    """Our layer with this rank's experts, and the exchange that runs them."""
    layout = context.layout
    with torch.device("meta"):
        moe = MoE(model_config(shape))
    for name, size in (("w13_E2FD", (2, shape.ffn // layout.etp, shape.hidden)),
                       ("w2_EDF", (shape.hidden, shape.ffn // layout.etp))):  # fmt: skip
        weight = torch.randn(EXPERTS // layout.ep, *size, device=context.device, dtype=torch.bfloat16) * 0.02
        setattr(moe.experts, name, nn.Parameter(weight))
    moe.router.weight = nn.Parameter(torch.randn(EXPERTS, shape.hidden, device=context.device) * 0.02)
    tensor = context.dense["tp"].get_group()
    call = build_exchange(context.expert["ep", "etp"], tensor, context.device, groups, exchange)
    moe.experts.call = call
    if tensor.size() > 1:
        moe.router.scope = RoutingScope(FullMicroBatch(tensor))
    return moe, call


def runs(layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward with backward."""
    dy_TD = torch.randn_like(x_TD)

    def forward() -> None:
        layer(x_TD)

    def both() -> None:
        layer(x_TD).backward(dy_TD)

    return forward, both


def _fresh(both: Callable[[], object], leaves: list[Tensor]) -> Callable[[], object]:
    """Without gradients of the call before to add to."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        both()

    return run


def measure(layer: Callable[[Tensor], Tensor], weights: list[Tensor], x_TD: Tensor, shape: Shape) -> dict[str, float]:
    """Milliseconds and useful TFLOP/s a GPU."""
    forward, both = runs(layer, x_TD)

    operations = 2 * 3 * x_TD.shape[0] * TOP_K * shape.hidden * shape.ffn
    ms_forward, ms_both = timed(forward), timed(_fresh(both, [*weights, x_TD]))
    return {
        "forward_ms": round(ms_forward, 3), "forward_tflops": round(operations / ms_forward / 1e9, 1),
        "both_ms": round(ms_both, 3), "both_tflops": round(3 * operations / ms_both / 1e9, 1),
    }  # fmt: skip


def hidden(call: ExpertExchange, both: Callable[[], object], repeats: int = 8) -> dict[str, float]:
    """How much of the communication's time computing hid, forward and backward together, by events."""
    call.start_timing()
    for _ in range(repeats):
        both()
    seconds, waited = call.read_times()
    return {"communication_ms": round(seconds / repeats * 1e3, 3), "hidden": round(1 - waited / seconds, 3)}


def measure_ours(
    shape: Shape, context: mesh.ParallelContext, tokens: int, groups: int, exchange: str
) -> dict[str, Any]:
    """Our layer with so many groups."""
    torch.manual_seed(context.rank)
    moe, call = our_moe(shape, context, groups, exchange)
    x_TD = torch.randn(tokens, shape.hidden, device=context.device, dtype=torch.bfloat16, requires_grad=True)

    def layer(x_TD: Tensor) -> Tensor:
        return moe(x_TD)[0]

    torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"kind": f"G={groups}, {call.exchange_reason.split(':')[0]}"}
    row |= measure(layer, list(moe.parameters()), x_TD, shape)
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row | hidden(call, _fresh(runs(layer, x_TD)[1], [*moe.parameters(), x_TD]))


def trace(shape: Shape, context: mesh.ParallelContext, tokens: int, groups: int, folder: Path) -> None:
    """Rank 0's timeline of one forward and backward, as a picture."""
    moe, _ = our_moe(shape, context, groups)
    x_TD = torch.randn(tokens, shape.hidden, device=context.device, dtype=torch.bfloat16, requires_grad=True)
    both = runs(lambda x: moe(x)[0], x_TD)[1]
    both = _fresh(both, [*moe.parameters(), x_TD])
    for _ in range(4):
        both()
    layout = context.layout
    path = folder / f"timeline-ep{layout.ep}-etp{layout.etp}-G{groups}.png"
    record(
        both, path if context.is_main else None, f"MoE layer, h {shape.hidden}, ffn {shape.ffn}, G={groups}, {layout}"
    )


def measure_peer(shape: Shape, context: mesh.ParallelContext, tokens: int) -> dict[str, Any]:
    """megatron-core's layer."""
    layer = megatron_moe(shape.hidden, shape.ffn, EXPERTS, TOP_K, CAPACITY, context.layout)
    x_T1D = torch.randn(tokens, 1, shape.hidden, device=context.device, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    row = measure(lambda x: layer(x)[0], list(layer.parameters()), x_T1D, shape)
    return {"kind": PEER} | row | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def ways(groups: list[int], ranks: int) -> list[tuple[int, str]]:
    """Numbers of groups, each with its `parallel.exchange`: a single one with both, if rows travel along ep at all."""
    both = ("collectives", "auto") if ranks > 1 else ("collectives",)
    return [(number, exchange) for number in groups for exchange in (both if number == 1 else both[:1])]


def measure_shape(name: str, context: mesh.ParallelContext, groups: list[int], peer: bool) -> list[dict[str, Any]]:
    """Rows of one shape, each printed when it is there."""
    shape, layout, rows = SHAPES[name], context.layout, []
    tokens = shape.tokens // layout.tp
    jobs = [partial(measure_ours, shape, context, tokens, *way) for way in ways(groups, layout.ep)]
    if peer:
        jobs.append(partial(measure_peer, shape, context, tokens))
    for job in jobs:
        rows.append({"layout": f"EP{layout.ep} x ETP{layout.etp}, TP{layout.tp}", "shape": name, **job()})
        torch.cuda.empty_cache()
        if context.is_main:
            print(json.dumps(rows[-1]), flush=True)
    return rows


def write(rows: list[dict[str, Any]], folder: Path, layout: Layout) -> None:
    """This layout's figures, and a table of all layouts' that lie in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"moe-ep{layout.ep}-etp{layout.etp}.json").write_text(json.dumps(rows, indent=1) + "\n")
    found = [row for path in sorted(folder.glob("moe-*.json")) for row in json.loads(path.read_text())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    columns = ["layout", "shape", "layer", "forward ms", "both ms", "TFLOP/s a GPU", f"x {PEER}", "exchange ms",
               "of it hidden", "peak GiB"]  # fmt: skip
    lines = [
        f"MoE layer on {dist.get_world_size()} {torch.cuda.get_device_name()}, {datetime.date.today().isoformat()}: "
        f"torch {torch.__version__}, triton {triton.__version__}, {PEER} {version(PEER)}, NCCL {nccl}.",
        f"{EXPERTS} experts, top-{TOP_K}, capacity factor {CAPACITY}, bf16; medians.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in found:
        peer = next(
            (r for r in found if (r["layout"], r["shape"], r["kind"]) == (row["layout"], row["shape"], PEER)), None
        )
        ratio = f"{row['both_tflops'] / peer['both_tflops']:.2f}" if peer else ""
        hidden_text = f"{row['hidden']:.0%}" if "hidden" in row else ""
        cells = (row["layout"], row["shape"], row["kind"], row["forward_ms"], row["both_ms"], row["both_tflops"], ratio,
                 row.get("communication_ms", ""), hidden_text, row["peak_gib"])  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "moe.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure every shape with every number of groups, and the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("ep", "etp", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--groups", default="1,2,4,8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trace", type=int, default=0, metavar="G", help="draw the large shape's timeline")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    parallel = ParallelConfig(ep=options.ep, etp=options.etp, tp=options.tp)
    layout = plan_layout(mesh.world_size(), parallel, model_config(SHAPES["large"]))
    context = mesh.start(ClusterConfig(device="cuda"), layout)
    groups = [int(number) for number in options.groups.split(",")]
    rows = [row for name in options.shapes.split(",") for row in measure_shape(name, context, groups, options.peer)]
    if context.is_main:
        write(rows, options.out, layout)
    if options.trace:
        shape = SHAPES["large"]
        trace(shape, context, shape.tokens // layout.tp, options.trace, options.out)
    mesh.stop()


if __name__ == "__main__":
    main()

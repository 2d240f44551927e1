#!/usr/bin/env python
"""Eyes on GPUs: the vision transformer beside a compiled CLIP, steps with images, and how evenly ranks share tiles.

`torchrun --standalone --nproc-per-node N -m mmtrain.bench.vision_gpu --out DIR`. Figures go to DIR/vision.json as they
come:

- *tower*: tiles/s of a GPU, forward and backward, bf16, of the released vision transformer, and of transformers'
  `CLIPVisionModel` of the same shape under `torch.compile`, on the same tiles in the same run;
- *step*: seconds of a step with images of many resolutions, beside the same rows as a text model has them plus the
  vision transformer alone, forward and backward, on as many tiles as the busiest rank has in each micro-batch;
- *balance*: tiles of the busiest rank over the mean, and the step, with and without `parallel.balance_images`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdata.images.batch import ImageBatch
from mmtrain.bench.timing import Clock, slowest, timed
from mmtrain.bench.vision_rows import vision_rows
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig, VisionConfig
from mmtrain.config.cli import compose
from mmtrain.model.init import initialise_parameters
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from mmtrain.vision.flops import encoder_flops
from mmtrain.vision.images import normalise
from mmtrain.vision.vit import VisionTransformer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TILES = 64
SEQ_LEN, MICRO_BATCHES = 16384, 2
Figures = dict[str, Any]


def model_of(name: str) -> ModelConfig:
    """A model of configs/model; one without eyes is given the released ones."""
    found = compose([f"model={name}", "run.name=x", "data.path=x"], CONFIGS).model
    return found if found.vision is not None else replace(found, vision=VisionConfig(image_token=5))


def tower(device: torch.device, config: VisionConfig) -> VisionTransformer:
    """The vision transformer alone, in bf16, with initial weights."""
    with torch.device("meta"):
        made = VisionTransformer(config)
    made = made.to_empty(device=device)
    initialise_parameters(made, 0)
    return made.bfloat16()


def clip(device: torch.device, config: VisionConfig) -> nn.Module:
    """Transformers' CLIP of the same shape, compiled."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = CLIPVisionConfig(
        hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, image_size=config.tile_size,
        patch_size=config.patch_size, hidden_act=config.activation, layer_norm_eps=config.norm_eps,
        attn_implementation="sdpa",
    )  # fmt: skip
    return torch.compile(CLIPVisionModel(shape).to(device, torch.bfloat16))


def tiles_per_second(run: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], tiles_N3SS: Tensor) -> Figures:
    """Rate and memory of forward and backward over the same tiles."""
    torch.cuda.reset_peak_memory_stats()
    gradient: list[Tensor] = []

    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        y = run(tiles_N3SS)
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    ms = timed(call, repeats=10)
    return {"tiles_s": round(len(tiles_N3SS) / ms * 1e3, 1), "ms": round(ms, 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}  # fmt: skip


def measure_tower(context: mesh.ParallelContext, model: ModelConfig, peer: bool, count: int = TILES) -> Figures:
    """Ours, or the compiled peer."""
    vision, device = model.vision, context.device
    assert vision is not None
    size = (count, 3, vision.tile_size, vision.tile_size)
    tiles = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    made = clip(device, vision) if peer else tower(device, vision)
    run = (lambda x: made(normalise(x).bfloat16()).last_hidden_state) if peer else lambda x: made(normalise(x))
    found = tiles_per_second(run, list(made.parameters()), tiles)
    flops = 3 * encoder_flops(model, 1, 0) * found["tiles_s"]
    return {"tiles": count, **found, "tflops": round(flops / 1e12, 1)}


def measure_step(
    context: mesh.ParallelContext, model: ModelConfig, seeing: ModelConfig, balance: bool, seq_len: int
) -> Figures:
    """Steps on rows with images, or on the same rows as text, if the model is `seeing` without its eyes."""
    options = {"reshard_after_forward": False, "balance_images": balance, "cuda_graphs": False}
    laid = apply_parallel(meta_model(model), context, ParallelConfig(**options), torch.bfloat16)
    laid.initialise(0)
    optimizer, clock, seconds, results = build_optimizer(laid.module, OptimConfig()), Clock(context.device), [], []
    for step in range(6):
        numbers = range(MICRO_BATCHES * context.dp_rank, MICRO_BATCHES * (context.dp_rank + 1))
        batches = [vision_rows(seeing, seq_len, number) for number in numbers]
        if model.vision is None:
            batches = [replace(batch, images=()) for batch in batches]
        clock.wait()
        dist.barrier()
        begin = clock.mark()
        results.append(train_step(laid, optimizer, list(batches), 1e-5, model.rope_base, clip_grad=1.0))
        end = clock.mark()
        clock.wait()
        seconds += [clock.ms(begin, end) / 1e3] if step > 1 else []
    found = {"step_s": slowest([statistics.median(seconds)], context.device)[0], "loss": results[-1].loss,
             "busiest_tiles": busiest_tiles(context, batches, balance), "max_over_mean": results[-1].image_balance,
             "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}  # fmt: skip
    laid.close()
    return found


def busiest_tiles(context: mesh.ParallelContext, batches: Sequence[ImageBatch], balance: bool) -> list[int]:
    """Most tiles that a rank looks at, of each micro-batch."""
    mine = torch.tensor([batch.num_tiles for batch in batches])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    tiles_RM = torch.stack(every)
    return (tiles_RM.sum(0).add(len(every) - 1).div(len(every), rounding_mode="floor") if balance
            else tiles_RM.amax(0)).tolist()  # fmt: skip


class Notes:
    """The file of all figures, written anew after each; one that fails is an entry too."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows: list[Figures] = []

    def __call__(self, name: str, run: Callable[..., Figures], *arguments: Any) -> Figures:
        """Run one and keep its figures."""
        try:
            found = run(*arguments)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()  # a model under hooks refers to itself, and would keep its memory
        torch.cuda.empty_cache()
        self.rows.append({"name": name, **found})
        if self.writes:
            print(name, json.dumps(found), flush=True)
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            machine = {"device": device, "gpus": dist.get_world_size(),
                       "torch": torch.__version__, "cuda": torch.version.cuda}  # fmt: skip
            self.path.write_text(json.dumps({**machine, "rows": self.rows}, indent=1))
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--smoke", action="store_true", help="steps of a tiny model on CPUs")
    parser.add_argument("--model", default="hybrid_410m", help="of the steps: a file of configs/model")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens of a row of the steps")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, seq_len = model_of("tiny_vl" if options.smoke else options.model), 1024 if options.smoke else options.seq_len
    context = mesh.start(ClusterConfig(device="cpu" if options.smoke else "cuda"))
    note = Notes(options.out / "vision.json", context.is_main)
    if not options.smoke:
        note("tower", measure_tower, context, model, False)
        if options.peer:
            note("tower of transformers, compiled", measure_tower, context, model, True)
    text = note(f"step of {model.name}, text alone", measure_step, context, replace(model, vision=None), model, True,
                seq_len)  # fmt: skip
    for balance in (True, False):
        found = note(f"step with images, balance={balance}", measure_step, context, model, model, balance, seq_len)
        if not options.smoke and not {"error"} & (text.keys() | found.keys()):
            note(f"step with images over its parts, balance={balance}", over_parts, context, model, text, found)
    mesh.stop()


def over_parts(context: mesh.ParallelContext, model: ModelConfig, text: Figures, found: Figures) -> Figures:
    """The step over that of text and the eyes alone, on the tiles of the busiest rank."""
    eyes_ms = [measure_tower(context, model, False, count)["ms"] for count in found["busiest_tiles"] if count]
    parts = text["step_s"] + sum(eyes_ms) / 1e3
    return {"eyes_ms": eyes_ms, "parts_s": parts, "over_parts": found["step_s"] / parts}


if __name__ == "__main__":
    main()

"""What a run says before its first step: where it runs, what it trains, how far, from what and to where."""

from __future__ import annotations

import os
import platform

import torch

from mmtrain.checkpoint.progress import Progress
from mmtrain.config import PretrainConfig
from mmtrain.log.console import count_text
from mmtrain.model.flops import count_parameters
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.train.curriculum import PhasePlan, RunPlan
from mmtrain.vision.flops import count_vision_parameters

_RECOMPUTED = {
    "none": "nothing recomputed",
    "selective": "all but softmax attention recomputed in backward",
    "block": "each block recomputed in backward",
}


def header_lines(
    config: PretrainConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    plan: RunPlan,
    progress: Progress,
    origin: str,
) -> list[str]:
    """Return the lines that open a run.

    Args:
        config: every option.
        context: processes and device.
        dtype: of the products.
        plan: steps of all phases.
        progress: where this launch begins.
        origin: what the weights come from.
    """
    steps, tokens = plan.left(progress, _limit(config, progress))
    return [
        *run_lines(config, context, dtype, origin),
        *(_phase(phase) for phase in plan.phases),
        f"ahead   {steps:,} steps, {count_text(tokens)} tokens",
    ]


def run_lines(config: PretrainConfig, context: ParallelContext, dtype: torch.dtype, origin: str) -> list[str]:
    """Return a line each on the run, device, layout, model and numbers; arguments as of :func:`header_lines`."""
    parallel, layout = config.parallel, context.layout
    recompute = _RECOMPUTED[str(parallel.activation_checkpoint)]
    return [
        f"run     {config.run.name}: {origin}",
        f"device  {_device(context)}, torch {torch.__version__}",
        f"layout  {layout.world} {'process' if layout.world == 1 else 'processes'}: {layout}",
        f"model   {_model(config)}",
        f"numbers {str(dtype).removeprefix('torch.')} products, float32 weights and gradients; "
        f"{config.optim.name}; {recompute}",
    ]


def _limit(config: PretrainConfig, progress: Progress) -> int:
    most = config.run.max_steps
    return 2**62 if most is None else max(0, most - progress.step)


def _device(context: ParallelContext) -> str:
    if context.device.type == "cuda":
        here = torch.cuda.get_device_properties(context.device)
        return f"{here.name}, {here.total_memory / 2**30:.0f} GiB"
    return f"CPU, {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _model(config: PretrainConfig) -> str:
    counted = count_parameters(config.model)
    eyes = count_vision_parameters(config.model)
    told = (
        f"{config.model.name}: {count_text(counted.total)} parameters{' of text' if eyes else ''}, "
        f"{count_text(counted.activated_without_embeddings)} activated a token without embeddings"
    )
    if not eyes:
        return told
    tower = count_text(eyes["vision_tower"])
    return f"{told}; {count_text(sum(eyes.values()))} of its eyes, {tower} of them the vision transformer"


def _phase(plan: PhasePlan) -> str:
    phase, (steps, tokens) = plan.phase, plan.left()
    own = f"; {plan.laid.layout}" if phase.parallel is not None and plan.laid is not None else ""
    batches = " -> ".join(count_text(rows * phase.seq_len) for rows in dict.fromkeys(plan.rows))
    return (
        f"phase   {phase.name}: rows of {phase.seq_len:,} tokens, RoPE base {phase.rope_base:g}, "
        f"{count_text(tokens)} tokens in {steps:,} steps of {batches}{own}"
    )

"""Work that a run does before its first step, so that no step waits for it."""

from __future__ import annotations

import time

import torch

from mmkernels.softmax import build_plans
from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.model.model import HybridLM
from mmtrain.parallel.mesh import ParallelContext


def plan_attention(
    model: HybridLM, context: ParallelContext, dtype: torch.dtype, seq_len: int, recompute: bool
) -> str | None:
    """Build cuDNN's graphs for every length that documents of rows of `seq_len` tokens can have.

    Each rank has documents of its own, so without this nearly every step of a long beginning waits for some rank's.

    Args:
        recompute: whether blocks are computed again in backward, as activation checkpointing does.

    Returns:
        What was done, for the log; None if there was nothing to do.
    """
    if not any(block.spec is SOFTMAX for block in model.layers):  # a pipeline's rank may have none
        return None
    began, config, tp = time.perf_counter(), model.config, context.layout.tp
    count = build_plans(
        config.num_heads // tp,
        max(1, config.num_kv_heads // tp),  # fewer than ranks are replicated
        config.head_dim,
        dtype,
        context.device,
        seq_len // context.layout.cp,  # more of a document does not lie on one rank
        recompute=recompute,
    )
    if count == 0:
        return None
    torch.cuda.empty_cache()  # blocks of the longest documents, which the model need not have
    return f"softmax attention planned for {count} lengths of documents in {time.perf_counter() - began:.1f} s"

"""Work that a run does before its first step, so that no step waits for it."""

from __future__ import annotations

import time
from typing import Any

import torch

from mmkernels.softmax import build_plans
from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.model.model import HybridLM
from mmtrain.parallel.mesh import ParallelContext


class AttentionPlans:
    """cuDNN's graphs for softmax attention that this process has; torch keeps them as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], set[int]] = {}  # by the shape of heads, lengths

    def build(
        self,
        model: HybridLM,
        context: ParallelContext,
        dtype: torch.dtype,
        seq_len: int,
        recompute: bool,
        rows: int = 1,
    ) -> str | None:
        """Build those for every length that documents of rows of `seq_len` tokens can have on a rank.

        Each rank has documents of its own, so without this nearly every step of a long beginning waits for some rank's.

        Args:
            recompute: whether blocks are computed again in backward, as activation checkpointing does.
            rows: of a micro-batch, whose tokens the ranks of cp share.

        Returns:
            What was done, for the log; None if there was nothing to do.
        """
        if not any(block.spec is SOFTMAX for block in model.layers):  # a pipeline's rank may have none
            return None
        began, config, tp = time.perf_counter(), model.config, context.layout.tp
        heads = config.num_heads // tp, max(1, config.num_kv_heads // tp), config.head_dim  # fewer ones are replicated
        known = self._known.setdefault((*heads, dtype, recompute), set())
        longest = min(seq_len, rows * seq_len // context.layout.cp)  # more of a document does not lie on one rank
        built = build_plans(*heads, dtype, context.device, longest, recompute=recompute, known=known)
        known.update(built)
        if recompute:  # those of a forward pass alone are among them
            self._known.setdefault((*heads, dtype, False), set()).update(built)
        if not built:
            return None
        torch.cuda.empty_cache()  # blocks of the longest documents, which the model need not have
        return f"softmax attention planned for {len(built)} lengths of documents in {time.perf_counter() - began:.1f} s"

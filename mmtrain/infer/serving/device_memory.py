"""Bytes of a device that an engine may take for its pages and slots."""

from __future__ import annotations

import torch

from mmtrain.infer.memory import free_bytes
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

_UNKNOWN = 1 << 30  # where the system does not say what is free


def cache_bytes(model: HybridLM, options: EngineOptions) -> int:
    """Return what the options give, or their share of what is free beside the weights and a step's own tensors.

    On a GPU a step of `prefill_tokens` is tried, and what it takes is left out. Each of the two paths lays out keys
    of one layer as one tensor, no more than all pages hold: for that two layers' worth of pages is left out. On a CPU
    memory is not taken before it is written to.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    device = model.embed_tokens.weight.device
    step = 0
    if device.type == "cuda":
        step = _step_bytes(model, options, device)
        torch.cuda.empty_cache()
    free = free_bytes(device)
    share = int(options.memory_share * ((_UNKNOWN if free is None else free) - step))
    paged = sum(layer.spec.cache_size(model.config).token > 0 for layer in model.layers)
    return max(0, share * paged // (paged + 2) if paged else share)


@torch.no_grad()
def _step_bytes(model: HybridLM, options: EngineOptions, device: torch.device) -> int:
    """Peak memory of a pass over so many tokens of one document, with the logits of `max_running` of them."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tokens_T = torch.zeros(options.prefill_tokens, dtype=torch.int64, device=device)
    h_TD = model.final_states(tokens_T, Packing.from_lengths([options.prefill_tokens], device))
    model.lm_head(h_TD[: options.max_running]).float()
    return torch.cuda.max_memory_allocated(device) - before

"""The memory of a device that an engine takes for its pages and slots, before it starts."""

from __future__ import annotations

import torch

from mmtrain.errors import ConfigError
from mmtrain.infer.memory import free_for_rank, is_out_of_memory
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.memory_plan import plan_memory, without_copies
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

_UNKNOWN = 1 << 30  # where the system does not say what is free


def take_memory(model: HybridLM, options: EngineOptions, ranks: Ranks = ALONE) -> CacheMemory:
    """Plan the memory of an engine, and take it. Several ranks plan alike, from the least that one of them has.

    Args:
        model: on one device; the dtype of its weights is that of the keys.
        options: sizes, of each rank.
        ranks: processes that the model is laid over.

    Raises:
        ConfigError: it is not enough for one request, cannot be had, or a mixer cannot be served.
    """
    weight, config = model.embed_tokens.weight, ranks.own_heads(model.config)
    budget = ranks.least(cache_bytes(model, options, ranks))
    plan = plan_memory(config, options, weight.element_size(), budget)

    def take() -> CacheMemory:
        try:
            return CacheMemory(config, plan, weight.dtype, weight.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size, where = f"{plan.bytes / (1 << 30):.1f} GiB", f"cannot be had on {weight.device}"
            raise ConfigError("engine.memory_bytes", size, where, "give less, or a smaller memory_share") from None

    return ranks.check_alike(take)


def cache_bytes(model: HybridLM, options: EngineOptions, ranks: Ranks = ALONE) -> int:
    """Return what the options give, or their share of what is free beside the weights and a step's own tensors.

    On a GPU a step of `prefill_tokens` is tried, and what it takes is left out. On a CPU memory is not taken before it
    is written to, and ranks share it.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    device = model.embed_tokens.weight.device
    step = 0
    if device.type == "cuda":
        step = _step_bytes(model, options, device)
        torch.cuda.empty_cache()
    free = free_for_rank(device, ranks.size)
    share = int(options.memory_share * ((_UNKNOWN if free is None else free) - step))
    return without_copies(model.config, share)


@torch.no_grad()
def _step_bytes(model: HybridLM, options: EngineOptions, device: torch.device) -> int:
    """Peak memory of a pass over so many tokens of one document, with the logits of `max_running` of them."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tokens_T = torch.zeros(options.prefill_tokens, dtype=torch.int64, device=device)
    h_TD = model.final_states(tokens_T, Packing.from_lengths([options.prefill_tokens], device))
    model.lm_head(h_TD[: options.max_running]).float()
    return torch.cuda.max_memory_allocated(device) - before

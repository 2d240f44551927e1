"""The memory of a device that an engine takes for its pages and slots, before it starts."""

from __future__ import annotations

import torch

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.context.caches import share_cache
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.memory import free_for_rank, is_out_of_memory
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.document_images import TILES_AT_ONCE
from mmtrain.infer.serving.memory_plan import MemoryPlan, plan_memory, without_copies
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing
from mmtrain.vision.model import VisionLanguageModel

_UNKNOWN = 1 << 30  # where the system does not say what is free


def take_memory(
    model: HybridLM, options: EngineOptions, ranks: Ranks = ALONE, context: ContextParallel | None = None
) -> CacheMemory:
    """Plan the memory of an engine, and take it. Several ranks plan alike, from the least that one of them has.

    Args:
        model: on one device; the dtype of its weights is that of the keys.
        options: sizes, of each rank.
        ranks: processes that the model is laid over.
        context: ranks that share out the pages, each as many as the one with the least memory can have.

    Raises:
        ConfigError: it is not enough for one request, cannot be had (on any rank), or a mixer cannot be served.
        RanksDiffer: ranks have different models or options.
    """
    weight, config = model.embed_tokens.weight, ranks.own_heads(model.config)
    if context is None:
        budget = ranks.least(cache_bytes(model, options, ranks.size))
        plan = plan_memory(config, options, weight.element_size(), budget)
        return ranks.check_alike(lambda: _take(model, config, plan))
    context.check_same("model or options", repr((model.config, options, weight.dtype)), weight.device)
    budget = context.least(cache_bytes(model, options, context.ranks), weight.device)
    plan = plan_memory(config, options, weight.element_size(), budget, context.ranks)
    memory = _try_to_take(model, config, plan)
    if not context.least(memory is not None, weight.device) or memory is None:
        raise _cannot_be_had(plan, weight.device)
    memory.layers = [share_cache(layer, context) for layer in memory.layers]
    return memory


def _take(model: HybridLM, config: ModelConfig, plan: MemoryPlan) -> CacheMemory:
    memory = _try_to_take(model, config, plan)
    if memory is None:
        raise _cannot_be_had(plan, model.embed_tokens.weight.device)
    return memory


def _cannot_be_had(plan: MemoryPlan, device: torch.device) -> ConfigError:
    size, where = f"{plan.bytes / (1 << 30):.1f} GiB", f"cannot be had on {device}"
    return ConfigError("engine.memory_bytes", size, where, "give less, or a smaller memory_share")


def _try_to_take(model: HybridLM, config: ModelConfig, plan: MemoryPlan) -> CacheMemory | None:
    """The memory of a plan; None where it cannot be had."""
    weight = model.embed_tokens.weight
    try:
        return CacheMemory(config, plan, weight.dtype, weight.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def cache_bytes(model: HybridLM, options: EngineOptions, ranks: int = 1) -> int:
    """Return what the options give, or their share of what is free beside the weights and a step's own tensors.

    On a GPU a step of `prefill_tokens` is tried, and a look at as many tiles as the eyes see at once, and what the
    larger of the two takes is left out. On a CPU memory is not taken before it
    is written to, and ranks share it.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    device = model.embed_tokens.weight.device
    step = 0
    if device.type == "cuda":
        step = max(_step_bytes(model, options, device), _look_bytes(model, device))
        torch.cuda.empty_cache()
    free = free_for_rank(device, ranks)
    share = int(options.memory_share * ((_UNKNOWN if free is None else free) - step))
    return without_copies(model.config, share)


@torch.no_grad()
def _look_bytes(model: HybridLM, device: torch.device) -> int:
    """Peak memory of a look at tiles; 0 without eyes."""
    if not isinstance(model, VisionLanguageModel) or model.encoder is None:
        return 0
    size, before = model.encoder.config.tile_size, torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tiles_N3SS = torch.zeros(TILES_AT_ONCE, 3, size, size, dtype=torch.uint8, device=device)
    model.encoder.projector(model.encoder.features(tiles_N3SS).flatten(0, 1))
    return torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def _step_bytes(model: HybridLM, options: EngineOptions, device: torch.device) -> int:
    """Peak memory of a pass over so many tokens of one document, with the logits of `max_running` of them."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tokens_T = torch.zeros(options.prefill_tokens, dtype=torch.int64, device=device)
    h_TD = model.final_states(tokens_T, Packing.from_lengths([options.prefill_tokens], device))
    model.lm_head(h_TD[: options.max_running]).float()
    return torch.cuda.max_memory_allocated(device) - before

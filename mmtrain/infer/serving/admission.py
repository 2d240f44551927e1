"""A request before it waits: one that could never be served is refused, and its images are looked at."""

from __future__ import annotations

import torch

from mmtrain.errors import OutOfDeviceMemory
from mmtrain.infer.memory import is_out_of_memory
from mmtrain.infer.serving.document_images import DocumentImages, look_at
from mmtrain.infer.serving.generation import GenerationRequest, RequestRefused
from mmtrain.infer.serving.memory_plan import MemoryPlan
from mmtrain.infer.serving.ranks import Ranks
from mmtrain.model.model import HybridLM


def check_request_size(request: GenerationRequest, plan: MemoryPlan, has_tokenizer: bool) -> None:
    """Refuse a request that could never be served.

    Raises:
        RequestRefused: it has more tokens than the planned memory holds, or stop texts without a tokenizer.
    """
    if request.stop and not has_tokenizer:
        raise RequestRefused("request.stop", request.stop, "needs a tokenizer", "give the engine one")
    most, longest = len(request.tokens) + request.max_tokens, plan.longest
    if longest is not None and most > longest:
        what = f"{len(request.tokens):,} of the prompt and {request.max_tokens:,} new"
        raise RequestRefused("request.tokens", f"{most:,} tokens", f"{what}; the cache holds {longest:,}",
                             "shorten it, or give the engine more memory")  # fmt: skip


def look_once(request: GenerationRequest, model: HybridLM, device: torch.device, ranks: Ranks) -> DocumentImages | None:
    """Look at the images of a request; None if it has none.

    Raises:
        RequestRefused: they do not fit into the device's memory.
        OutOfDeviceMemory: likewise, where other ranks share the weights: the process must end.
    """
    if request.images is None:
        return None
    try:
        return look_at(request.images, model)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tiles = len(request.images.tiles_N3SS)
        where = f"do not fit into the memory of {device} beside keys and states"
        if ranks.size > 1:
            raise OutOfDeviceMemory(
                f"rank {ranks.rank}: {tiles} tiles {where}; start again with a smaller memory_share"
            ) from None
        raise RequestRefused("request.images", f"{tiles} tiles", where, "give the engine less memory") from None

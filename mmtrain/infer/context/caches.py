"""The caches of a model's layers, made those of one of the ranks of context parallelism."""

from __future__ import annotations

from mmtrain.errors import ConfigError
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.context.lightning import ContextSlots
from mmtrain.infer.context.softmax import ContextPages
from mmtrain.model.mixers.batch_cache import BatchCache
from mmtrain.model.mixers.lightning_slots import LightningSlots
from mmtrain.model.mixers.softmax_pages import SoftmaxPages


def share_cache(local: BatchCache, context: ContextParallel) -> ContextSlots | ContextPages:
    """Return a layer's cache whose pages lie on all ranks, given that of this rank alone.

    Raises:
        ConfigError: its mixer has none.
    """
    if isinstance(local, LightningSlots):
        return ContextSlots(local, context)
    if isinstance(local, SoftmaxPages):
        return ContextPages(local, context)
    raise ConfigError("model.layer_pattern", type(local).__name__, "cannot be served under context parallelism",
                      "give it an entry in mmtrain/infer/context/caches.py, or serve on one rank")  # fmt: skip

"""Decode steps as CUDA graphs, recorded once: the host launches one in place of thousands of kernels.

A graph reads which documents it continues from memory that stays where it is. Numbers of documents, and of pages that
one has, are rounded up to a few; what is over are places that no document has, which mixers leave alone
(`BatchCache.takes_padding`).

Legend: N documents and places without one, D model width, V vocabulary, M pages of a document at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.batch_cache import DocumentBatch
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import to_device

_STEP = 16  # documents between the larger sizes: at most a quarter of a step is for nobody from 48 on. Ours.
_LEAST_PAGES, _MORE_PAGES = 64, 4  # widths of tables: 64 pages, 256, 1,024 ... How a document's keys are cut into runs
# follows from the width, so that short documents do not pay for the longest that could come. Ours.


class DecodeOutput(NamedTuple):
    """Output of a step, overwritten by the next of its size: final hidden states and logits."""

    h_ND: Tensor
    logits_NV: Tensor


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    output: DecodeOutput


class DecodeGraphs:
    """Steps of one token a document, recorded as they are first met. On a CPU they are padded, and nothing is recorded.

    Args:
        model: in evaluation mode, whole, on one device.
        memory: pages and slots, all of whose layers take padding.
    """

    def __init__(self, model: HybridLM, memory: CacheMemory) -> None:
        self._model, self._memory = model, memory
        self.sizes, self.widths = ladder(memory.plan.running), widths(memory.plan.pages)
        pages, device = memory.plan.pages, memory.device
        self._numbers_3N = torch.zeros(3, self.sizes[-1], dtype=torch.int64, device=device)  # tokens, keys, slots
        self._table_NM = torch.zeros(self.sizes[-1], pages, dtype=torch.int64, device=device)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.no_grad()
    def run(self, documents: Sequence[Document]) -> DecodeOutput:
        """Take documents one token further, on the current stream.

        Args:
            documents: that lack one token each, with a page for it.

        Returns:
            Those of the documents, in their order.
        """
        count = len(documents)
        pages = max((len(document.pages) for document in documents), default=0)
        shape = self.sizes[bisect_left(self.sizes, count)], self.widths[bisect_left(self.widths, pages)]
        if self._pool is not None and shape not in self._recorded:
            self._recorded[shape] = self._record(*shape)  # before the documents are there: it touches nobody's memory
        self._load(documents, shape[0], pages)
        if self._pool is None:
            output = self._forward(*shape)
        else:
            recorded = self._recorded[shape]
            recorded.graph.replay()
            output = recorded.output
        return DecodeOutput(output.h_ND[:count], output.logits_NV[:count])

    def _load(self, documents: Sequence[Document], size: int, pages: int) -> None:
        """Write the documents, and places without one, to where graphs read them."""
        numbers_3N = np.zeros((3, size), dtype=np.int64)
        numbers_3N[2] = -1
        table_NM = np.zeros((len(documents), pages), dtype=np.int64)
        for n, document in enumerate(documents):
            numbers_3N[:, n] = document.tokens[-1], len(document.tokens), document.slot
            table_NM[n, : len(document.pages)] = np.asarray(document.pages, dtype=np.int64)
        self._numbers_3N[:, :size].copy_(to_device(torch.from_numpy(numbers_3N), self._memory.device))
        if pages:
            given = to_device(torch.from_numpy(table_NM), self._memory.device)
            self._table_NM[: len(documents), :pages].copy_(given)

    def _forward(self, size: int, width: int) -> DecodeOutput:
        tokens_N, keys_N, slots_N = self._numbers_3N[:, :size]
        batch = DocumentBatch.padded(keys_N, slots_N, self._table_NM[:size, :width], self._memory.shape)
        h_ND = self._model.final_states(tokens_N, batch.packing, self._memory.view(batch))
        return DecodeOutput(h_ND, self._model.lm_head(h_ND))

    def _record(self, size: int, width: int) -> _Recorded:
        self._load([], size, 0)
        stream = torch.cuda.current_stream(self._memory.device)
        self._forward(size, width)  # compiles kernels and chooses among them, which cannot be recorded
        torch.cuda.synchronize(self._memory.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = self._forward(size, width)
        return _Recorded(graph, output)


def ladder(most: int) -> list[int]:
    """Sizes of batches, ascending: powers of two up to 16, then every 16, to one that holds `most`."""
    small = [size for size in (1, 2, 4, 8) if size < most]
    return [*small, *range(_STEP, most, _STEP), -(-most // _STEP) * _STEP] if most > 8 else [*small, most]


def widths(pages: int) -> list[int]:
    """Widths of tables, ascending, to one that holds all pages; 0 alone without pages."""
    found = [_LEAST_PAGES] if pages else [0]
    while found[-1] < pages:
        found.append(found[-1] * _MORE_PAGES)
    return [min(width, pages) for width in found]


def records_decode(model: HybridLM, memory: CacheMemory, options: EngineOptions) -> bool:
    """Tell whether decode steps run as graphs.

    Raises:
        ConfigError: `cuda_graphs` asks for them, and they cannot be had.
    """
    weight, problem = model.embed_tokens.weight, ""
    if not all(layer.takes_padding for layer in memory.layers):
        problem = "a mixer's memory takes no padding"
    elif model.config.num_experts and weight.dtype != torch.bfloat16 and weight.device.type == "cuda":
        # torch has grouped products in bfloat16 alone; else it asks the device for each expert's number of rows.
        problem = "experts in fp32 wait for the numbers of their rows"
    if options.cuda_graphs and problem:
        raise ConfigError("engine.cuda_graphs", True, problem, "leave it out, or serve in bf16")
    if options.cuda_graphs is None:
        return weight.device.type == "cuda" and not problem
    return options.cuda_graphs

"""Decode steps as CUDA graphs, recorded once: the host launches one in place of thousands of kernels.

A graph reads which documents it continues from memory that stays where it is. Numbers of documents, and of pages that
one has, are rounded up to a few; what is over are places that no document has, which mixers leave alone
(`BatchCache.takes_padding`).

Legend: N documents and places without one, D model width, V vocabulary, M pages of a document at most.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.graph_store import GraphStore
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.batch_cache import DocumentBatch
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import to_device

_STEP = 16  # documents between the larger sizes: at most a quarter of a step is for nobody from 48 on. Ours.
_LEAST_PAGES, _MORE_PAGES = 64, 4  # widths of tables: 64 pages, 256, 1,024 ... How a document's keys are cut into runs
# follows from the width, so that short documents do not pay for the longest that could come. Ours.


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
        self._written: list[tuple[array[int] | None, int]] = [(None, 0)] * self.sizes[-1]  # pages of the table's rows
        self._graphs: GraphStore[tuple[int, int], Tensor] = GraphStore(device)

    @torch.no_grad()
    def run(self, documents: Sequence[Document]) -> Tensor:
        """Take documents one token further, on the current stream.

        Args:
            documents: that lack one token each, with a page for it.

        Returns:
            Logits of the documents in their order, [N, V], overwritten by the next step of their size.
        """
        count = len(documents)
        pages = max((len(document.pages) for document in documents), default=0)
        shape = self.sizes[bisect_left(self.sizes, count)], self.widths[bisect_left(self.widths, pages)]
        self._load(documents, shape[0])
        return self._graphs.run(shape, lambda: self._forward(*shape))[:count]

    def _load(self, documents: Sequence[Document], size: int) -> None:
        """Write the documents, and places without one, to where graphs read them: in one copy to the device.

        Of pages it has the rows that are not there yet. A running document's pages only grow, once in `page_tokens`
        steps, so that most steps write the numbers alone.
        """
        rows = [n for n, document in enumerate(documents) if not self._holds(n, document.pages)]
        width = max((len(documents[n].pages) for n in rows), default=0)
        sent = np.zeros(3 * size + len(rows) * (1 + width), dtype=np.int64)
        numbers_3N, table_CM = sent[: 3 * size].reshape(3, size), sent[3 * size + len(rows) :].reshape(-1, width or 1)
        numbers_3N[2] = -1
        numbers_3N[0, : len(documents)] = [document.tokens[-1] for document in documents]
        numbers_3N[1, : len(documents)] = [len(document.tokens) for document in documents]
        numbers_3N[2, : len(documents)] = [document.slot for document in documents]
        sent[3 * size : 3 * size + len(rows)] = rows
        for row_M, n in zip(table_CM, rows, strict=False):
            row_M[: len(documents[n].pages)] = np.asarray(documents[n].pages, dtype=np.int64)
        given = to_device(torch.from_numpy(sent), self._memory.device)
        self._numbers_3N[:, :size].copy_(given[: 3 * size].view(3, size))
        if width:
            index_C, given_CM = given[3 * size :].split((len(rows), len(rows) * width))
            self._table_NM[:, :width].index_copy_(0, index_C, given_CM.view(-1, width))
        for n in rows:
            self._written[n] = documents[n].pages, len(documents[n].pages)

    def _holds(self, row: int, pages: array[int]) -> bool:
        """Whether a row of the table has these pages: the same list, no longer than when it was written."""
        written, count = self._written[row]
        return written is pages and count == len(pages)

    def _forward(self, size: int, width: int) -> Tensor:
        tokens_N, keys_N, slots_N = self._numbers_3N[:, :size]
        batch = DocumentBatch.padded(keys_N, slots_N, self._table_NM[:size, :width], self._memory.shape)
        h_ND = self._model.final_states(tokens_N, batch.packing, self._memory.view(batch))
        return self._model.lm_head(h_ND)


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

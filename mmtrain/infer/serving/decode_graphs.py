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
from mmtrain.infer.serving.staging import Staging
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
        most, pages, device = self.sizes[-1], memory.plan.pages, memory.device
        self._staging = Staging(3 * _row(most) + 2 * most, device)  # of the documents, and an entry of the table each
        self._table_NM = torch.zeros(most, pages, dtype=torch.int64, device=device)
        self._pages: list[array[int] | None] = [None] * most  # of the table's rows
        self._held = [0] * most  # how many of each row's pages are in the table
        self._graphs: GraphStore[tuple[int, int], Tensor] = GraphStore(device)

    def run(self, documents: Sequence[Document]) -> Tensor:
        """Take documents one token further, on the current stream.

        Args:
            documents: that lack one token each, with a page for it.

        Returns:
            Logits of the documents in their order, [N, V], overwritten by the next step of their size.
        """
        pages, count = [document.pages for document in documents], len(documents)
        held = list(map(len, pages))
        shape = self.sizes[bisect_left(self.sizes, count)], self.widths[bisect_left(self.widths, max(held, default=0))]
        self._load(documents, shape[0], *self._new_entries(pages, held))
        self._pages[:count], self._held[:count] = pages, held
        return self._graphs.run(shape, lambda: self._forward(*shape))[:count]

    def _new_entries(self, pages: list[array[int]], held: list[int]) -> tuple[list[int], list[int]]:
        """Find what the table lacks of the documents' pages: places in it, laid row after row, and the pages there.

        A running document's pages only grow, once in `page_tokens` steps: most steps find nothing.
        """
        places: list[int] = []
        numbers: list[int] = []
        count, width = len(pages), self._table_NM.shape[1]
        if pages == self._pages[:count] and held == self._held[:count]:
            return places, numbers
        for row in range(count):
            first = self._held[row] if pages[row] is self._pages[row] else 0
            places += range(row * width + first, row * width + held[row])
            numbers += pages[row][first:]
        return places, numbers

    def _load(self, documents: Sequence[Document], size: int, places: list[int], numbers: list[int]) -> None:
        """Write the documents, places without one, and new entries of the table to where graphs read them.

        All goes in one copy; where many entries are new, as where a long document came, they take another.
        """
        empty, few = _row(size) - len(documents), len(places) <= self.sizes[-1]
        sent = [document.tokens[-1] for document in documents] + [0] * empty
        sent += [len(document.tokens) for document in documents] + [0] * empty
        sent += [document.slot for document in documents] + [-1] * empty
        self._staging.send(sent + places + numbers if few else sent)
        if places:
            given = self._staging.there[len(sent) :] if few else self._sent_apart(places + numbers)
            index_E, numbers_E = given[: 2 * len(places)].view(2, -1)
            self._table_NM.view(-1).index_copy_(0, index_E, numbers_E)

    def _sent_apart(self, numbers: list[int]) -> Tensor:
        return to_device(torch.from_numpy(np.array(numbers, dtype=np.int64)), self._memory.device)

    @torch.no_grad()
    def _forward(self, size: int, width: int) -> Tensor:
        tokens_N, keys_N, slots_N = self._staging.there[: 3 * _row(size)].view(3, -1)[:, :size]
        batch = DocumentBatch.padded(keys_N, slots_N, self._table_NM[:size, :width], self._memory.shape)
        h_ND = self._model.final_states(tokens_N, batch.packing, self._memory.view(batch))
        return self._model.lm_head(h_ND)


def _row(size: int) -> int:
    """Numbers that a row of so many is padded to, so that each begins at a multiple of 16 bytes, as kernels like it."""
    return size + size % 2


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

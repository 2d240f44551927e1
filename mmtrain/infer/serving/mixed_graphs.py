"""Steps in which short pieces of prompts stand beside decode steps, as one row and one CUDA graph.

Kernel by kernel the host takes 50 ms to launch a pass of `hybrid_7b` over 50 tokens, and every request that is being
decoded would wait for it: 60 ms a step on an H200 in place of 8; in one graph it is 9. Pieces are padded to 32, 64, 128
or 256 tokens (MiniMax-01 section 3.3 has levels of padding too); longer ones take a pass of their own (`Runner`).

Legend: D documents that get a token, T tokens of pieces, R = D + T rows, N pieces, M pages of a document at most, W
model width, V vocabulary; all with their padding.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.decode_graphs import ladder, widths
from mmtrain.infer.serving.document_images import show_images
from mmtrain.infer.serving.graph_store import GraphStore
from mmtrain.infer.serving.scheduler import Chunk, Step
from mmtrain.model.mixers.mixed_batch import MixedBatch
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import to_device

LEVELS = (32, 64, 128, 256)
"""Tokens of pieces that rows are padded to."""
PLACES = (2, 8)
"""Pieces of a row; the last place is of the padding alone."""
MOST_READS = 2**19
"""Keys that the tokens of pieces may see together: 2 GB of each softmax layer of `hybrid_7b`, half a millisecond by the
bytes."""
MOST_ENTRIES = 2**20
"""Entries of the table of pages, a row a token: 8 MB, made and sent in each step, and kept for each shape."""


class MixedShape(NamedTuple):
    """Sizes of a row, with padding: D, T, N and M."""

    decodes: int
    tokens: int
    places: int
    width: int


class MixedOutput(NamedTuple):
    """Hidden states of a step's tokens, decode steps first, and logits of the last token of each document."""

    h_TW: Tensor
    logits_NV: Tensor


class MixedGraphs:
    """Rows of decode steps and short pieces, recorded as they are first met. On a CPU they are padded alone.

    Args:
        model: in evaluation mode, whole, on one device.
        memory: pages and slots, all of whose layers take padding.
    """

    def __init__(self, model: HybridLM, memory: CacheMemory) -> None:
        self._model, self._memory = model, memory
        self._sizes, self._widths = [0, *ladder(memory.plan.running)], widths(memory.plan.pages)
        self._graphs: GraphStore[MixedShape, MixedOutput] = GraphStore(memory.device)
        self._batches: dict[MixedShape, tuple[Tensor, MixedBatch, Tensor]] = {}

    def takes(self, step: Step) -> bool:
        """Tell whether a step has pieces, all of them are short enough, and none of its tokens is an image's."""
        if not 0 < len(step.prefill) < PLACES[-1] or sum(count for _, count in step.prefill) > LEVELS[-1]:
            return False
        if show_images(step.decode) or show_images(step.prefill):
            return False
        shape = self._shape(step)
        if (shape.decodes + shape.tokens) * shape.width > MOST_ENTRIES:
            return False
        return sum(count * (document.computed + count) for document, count in step.prefill) <= MOST_READS

    @torch.no_grad()
    def run(self, step: Step) -> MixedOutput:
        """Take a step's documents further, on the current stream; its order is decode steps, then pieces."""
        shape = self._shape(step)
        if shape not in self._batches:
            self._batches[shape] = self._buffers(shape)
        self._load(shape, step)
        output = self._graphs.run(shape, lambda: self._forward(shape))
        decodes, tokens = len(step.decode), sum(count for _, count in step.prefill)
        every = ((output.h_TW, tokens), (output.logits_NV, len(step.prefill)))
        return MixedOutput(*(torch.cat([x[:decodes], x[shape.decodes :][:count]]) for x, count in every))

    def _shape(self, step: Step) -> MixedShape:
        tokens = sum(count for _, count in step.prefill)
        pages = max(len(document.pages) for document, _ in (*step.decode, *step.prefill))
        return MixedShape(
            self._sizes[bisect_left(self._sizes, len(step.decode))],
            LEVELS[bisect_left(LEVELS, tokens)],
            PLACES[bisect_left(PLACES, len(step.prefill) + 1)],
            self._widths[bisect_left(self._widths, pages)],
        )

    def _buffers(self, shape: MixedShape) -> tuple[Tensor, MixedBatch, Tensor]:
        """Memory that a graph of this shape reads: ids of the rows, the batch, and the rows whose logits are wanted."""
        device, rows = self._memory.device, shape.decodes + shape.tokens

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        batch = MixedBatch(
            zeros(shape.decodes), zeros(shape.places + 1, dtype=torch.int32), zeros(shape.places), zeros(shape.places),
            zeros(rows), zeros(rows, shape.width), zeros(shape.tokens), zeros(shape.tokens),
        )  # fmt: skip
        return zeros(rows), batch, zeros(shape.decodes + shape.places)

    def _load(self, shape: MixedShape, step: Step) -> None:
        """Write a step's documents to where its graph reads them."""
        ids_R, batch, last = self._batches[shape]
        slots_D, decode_R = np.full(shape.decodes, -1), _Rows(shape.decodes, shape.width)
        for place, chunk in enumerate(step.decode):
            slots_D[place] = chunk.document.slot
            decode_R.add(chunk)
        pieces_R = _Rows(shape.tokens, shape.width)
        edges = [0]
        for chunk in step.prefill:
            pieces_R.add(chunk)
            edges.append(edges[-1] + chunk.count)
        n, spare = len(step.prefill), shape.places - len(step.prefill)
        slots = [chunk.document.slot for chunk in step.prefill]
        from_T = np.where(np.arange(shape.tokens) < pieces_R.used, np.arange(shape.tokens), 0)
        page = self._memory.plan.page_tokens
        position_T = np.maximum(pieces_R.keys[from_T] - 1, 0)
        table_TM = pieces_R.table[from_T]
        paged = shape.width > 0
        write_T = table_TM[np.arange(shape.tokens), position_T // page] * page + position_T % page if paged else from_T
        tails = [edge - 1 + shape.decodes for edge in edges[1:]]
        for target, values in (
            (ids_R, np.concatenate([decode_R.ids, pieces_R.ids])),
            (batch.slots_D, slots_D),
            (batch.cu_pieces, np.array(edges + [edges[-1]] * (spare - 1) + [shape.tokens], dtype=np.int32)),
            (batch.slots_N, np.array(slots + slots[:1] * spare)),
            (batch.from_N, np.array([*range(n), *[0] * spare])),
            (batch.keys_R, np.concatenate([decode_R.keys, pieces_R.keys])),
            (batch.table_RM, np.concatenate([decode_R.table, pieces_R.table])),
            (batch.write_T, write_T),
            (batch.from_T, from_T),
            (last, np.array([*range(shape.decodes), *tails, *[0] * spare])),
        ):
            target.copy_(to_device(torch.from_numpy(values), self._memory.device))

    def _forward(self, shape: MixedShape) -> MixedOutput:
        ids_R, batch, last = self._batches[shape]
        fresh = MixedBatch(*(getattr(batch, name) for name in batch.__dataclass_fields__))  # its packing is made anew
        h_RW = self._model.final_states(ids_R, fresh.packing, self._memory.view(fresh))
        return MixedOutput(h_RW, self._model.lm_head(h_RW.index_select(0, last)))


class _Rows:
    """Rows of one half, in their order: ids, keys that each sees, and pages; padding is zeros."""

    def __init__(self, rows: int, width: int) -> None:
        self.ids, self.keys = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        self.table, self.used = np.zeros((rows, width), dtype=np.int64), 0

    def add(self, chunk: Chunk) -> None:
        """Add the tokens of a piece."""
        document, count = chunk
        rows = slice(self.used, self.used + count)
        self.ids[rows] = document.tokens[document.computed : document.computed + count]
        self.keys[rows] = np.arange(document.computed + 1, document.computed + count + 1)
        self.table[rows, : len(document.pages)] = np.asarray(document.pages, dtype=np.int64)
        self.used += count

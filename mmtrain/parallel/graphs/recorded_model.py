"""Training passes of a model whose segments are CUDA graphs; what a graph cannot take runs as it always did.

Legend: T tokens, N documents that a graph has room for, R rotated dimensions.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from mmtrain.model.model import HybridLM, LossOutput, ModelInputs
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.graphs.recorded_segment import RESIDUAL, RecordedSegment, Recorder
from mmtrain.parallel.graphs.segments import SegmentInputs, cut, run_segments
from mmtrain.parallel.units import UnitWatch

TOKENS_A_DOCUMENT = 16
"""T over this is the number of documents that a graph has room for (and LEAST_DOCUMENTS at least): 512 in 8,192 tokens.
Ours. Room costs a few integers a document."""
LEAST_DOCUMENTS = 64
NO_MEMORY = "the device has not the memory that graphs keep"


class _Recording(NamedTuple):
    """Graphs of micro-batches of T tokens.

    Attributes:
        inputs: the memory that they read.
        segments: one an entry of `cut`.
    """

    inputs: SegmentInputs
    segments: list[RecordedSegment]


class RecordedModel:
    """The loss of a micro-batch, with autograd, from graphs that are recorded once for a number of tokens.

    The first micro-batch of each number of tokens runs without graphs, as compiling kernels and choosing among them
    cannot be recorded. The second is recorded and replayed, and so are all others, to the same bits: a graph has the
    same kernels in the same order.

    Args:
        model: the whole model, in training mode, with the weights that micro-batches compute with.
        most_tokens: of a micro-batch that is recorded; None: any number.
        dtype: of its products.
        watch: is told of the segments that are replayed; hooks tell it of all else.
    """

    def __init__(
        self,
        model: HybridLM,
        most_tokens: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        watch: UnitWatch | None = None,
    ) -> None:
        self._watch = watch
        self._model, self._segments, self._most_tokens = model, cut(model), most_tokens
        # torch has grouped products in bfloat16 alone; else it asks the device for each expert's number of rows.
        self._host_counts_rows = bool(model.config.num_experts) and dtype != torch.bfloat16
        self._tokens = 0
        self._recording: _Recording | None = None
        self._told: set[str] = set()
        self._notes: list[str] = []
        self._peak_before = self._pool_bytes = 0
        self._no_memory = False

    def __call__(self, batch: ModelInputs) -> LossOutput:
        """The loss of a micro-batch; its backward pass is replayed too."""
        tokens = batch.tokens_T.shape[0]
        problem = self._problem(batch)
        if not problem and tokens != self._tokens:
            self.close()
            self._tokens = tokens
            return self._model(*batch)
        if not problem and self._recording is None:
            problem = self._record(batch)
        if problem or self._recording is None:
            self._tell(problem)
            return self._model(*batch)
        inputs, segments = self._recording
        _load(inputs, SegmentInputs.of(batch, self._model))
        return run_segments(self._model, self._segments, segments, batch, inputs, self._watch)

    def peak_bytes(self) -> int:
        """The most that tensors and graphs have held on the device; torch counts little of what graphs work in."""
        return max(self._peak_before, torch.cuda.max_memory_allocated() + self._pool_bytes)

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call: what was recorded, and why a micro-batch ran without, each once."""
        notes, self._notes = self._notes, []
        return notes

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            self._notes.append(f"a micro-batch runs without CUDA graphs: {problem}")
            self._told.add(problem)

    def close(self) -> None:
        """Free the graphs and their memory."""
        if self._recording is not None:
            torch.cuda.synchronize()
            self._recording = None
            # cuBLAS keeps what it worked in on the stream of the recording, which lies in the graphs' memory.
            getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
            torch.cuda.empty_cache()
        self._tokens = self._peak_before = self._pool_bytes = 0
        self._no_memory = False

    def _problem(self, batch: ModelInputs) -> str:
        """Why graphs cannot take a micro-batch; empty if they can."""
        tokens = batch.tokens_T.shape[0]
        if self._most_tokens is not None and tokens > self._most_tokens:
            return f"cuda_graphs=auto records up to {self._most_tokens:,} tokens; kernels of {tokens:,} hide launches"
        if self._host_counts_rows:
            return "experts' products that are not in bfloat16 wait for the numbers of their rows"
        if batch.pairs is not None:
            return "the loss of preference pairs is not recorded"
        room = _room(tokens)
        if len(batch.packing.lengths) > room:
            return f"it has more documents than the {room} that a graph of its tokens has room for"
        if self._no_memory and tokens == self._tokens:
            return NO_MEMORY
        if batch.packing.real is not None and self._model.config.num_experts:
            return "experts take the tokens that are no padding, whose number changes"
        return ""

    def _record(self, batch: ModelInputs) -> str:
        """Record what takes a micro-batch like this one; returns why that could not be done, or nothing."""
        began = time.perf_counter()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what a pass without graphs took: they have memory of their own
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        self._peak_before = torch.cuda.max_memory_allocated()
        try:
            self._recording = self._graphs_of(batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._no_memory = True
            return NO_MEMORY
        grown = torch.cuda.memory_reserved() - reserved
        self._pool_bytes = max(0, grown - (torch.cuda.memory_allocated() - allocated))
        torch.cuda.reset_peak_memory_stats()
        self._notes.append(
            f"CUDA graphs of micro-batches of {self._tokens:,} tokens recorded in {time.perf_counter() - began:.1f} s; "
            f"they keep {grown / 2**30:.1f} GiB"
        )
        return ""

    def _graphs_of(self, batch: ModelInputs) -> _Recording:
        inputs, recorder = _memory_like(SegmentInputs.of(batch, self._model)), Recorder()
        hidden_TD = self._model.embed_tokens(batch.tokens_T)
        carried: tuple[torch.Tensor, ...] = (torch.zeros_like(hidden_TD.detach()),)
        wants: tuple[bool, ...] = (hidden_TD.requires_grad,)
        recorded: list[RecordedSegment] = []
        for segment in self._segments:
            one = RecordedSegment(segment, carried, wants, inputs, recorder)
            recorded.append(one)
            if segment.opens is not None:
                q_THK, residual_TD = one.left.passed[0], one.left.passed[RESIDUAL]
                carried = (torch.zeros_like(q_THK), residual_TD)
                wants = (any(one.wants[:RESIDUAL]), one.wants[RESIDUAL])  # attention's result: if q, k or v does
        residual_grad = None
        for one in reversed(recorded):
            if one.reached:
                one.record_backward(residual_grad)
                residual_grad = one.grads_in[-1]
        return _Recording(inputs, recorded)


def _room(tokens: int) -> int:
    """N: documents that a graph of so many tokens has room for."""
    return max(LEAST_DOCUMENTS, tokens // TOKENS_A_DOCUMENT)


def _memory_like(inputs: SegmentInputs) -> SegmentInputs:
    """Memory for the inputs of any micro-batch of as many tokens."""
    packing, (cos_TR2, sin_TR2), labels_T = inputs
    tokens = labels_T.shape[0]
    cu_seqlens = packing.cu_seqlens.new_full((_room(tokens) + 1,), tokens)
    cu_seqlens[0] = 0
    # Lengths are for softmax attention, which is in no graph.
    lasting = Packing(cu_seqlens, packing.position_ids_T, tokens, (tokens,))
    return SegmentInputs(lasting, (torch.zeros_like(cos_TR2), torch.zeros_like(sin_TR2)), torch.zeros_like(labels_T))


def _load(memory: SegmentInputs, inputs: SegmentInputs) -> None:
    """Copy a micro-batch's inputs to the memory that graphs read; documents that it has not got are empty ones."""
    cu_seqlens = inputs.packing.cu_seqlens
    memory.packing.cu_seqlens[: cu_seqlens.shape[0]].copy_(cu_seqlens)
    memory.packing.cu_seqlens[cu_seqlens.shape[0] :].fill_(inputs.labels_T.shape[0])
    for place, value in zip(memory.rope, inputs.rope, strict=True):
        place.copy_(value)
    memory.labels_T.copy_(inputs.labels_T)

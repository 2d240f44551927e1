"""Passes over the model: prefill and decode, side by side.

On a GPU each path has a stream of its own, so that decode steps, which wait for memory, run beside prefill, which waits
for the tensor cores (MiniMax-01 section 3.3 does so). The two meet after every step. Short pieces of prompts join the
decode steps in one row (`mixed_graphs`). Where several ranks share the weights paths run one after the other:
collectives of two streams would be launched in an order of their own on each.

Legend: T tokens of a path, N documents whose next token is wanted, M tokens that are scored, D model width, V
vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import ConfigError, OutOfDeviceMemory
from mmtrain.infer.memory import is_out_of_memory
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.decode_graphs import DecodeGraphs, records_decode
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.document_images import given_of, show_images
from mmtrain.infer.serving.mixed_graphs import MixedGraphs
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.infer.serving.scheduler import Chunk, Step
from mmtrain.infer.serving.scoring import LabelScores, label_scores
from mmtrain.model.mixers.batch_cache import DocumentBatch
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import to_device

Path = Callable[[list[Chunk]], "PathResult"]


class StepOutOfMemory(ConfigError):
    """Lack of memory for the tokens of one step."""


@dataclass(frozen=True)
class PathResult:
    """What a path gives.

    Attributes:
        documents: those whose next token is wanted.
        logits_NV: theirs, in the dtype of the weights.
        scored: documents with scored prompt tokens, and how many.
        scores: of these tokens, end to end; None if there are none.
    """

    documents: list[Document]
    logits_NV: Tensor
    scored: list[tuple[Document, int]]
    scores: LabelScores | None


class Wanted(NamedTuple):
    """What is wanted of a row.

    Attributes:
        documents: those whose next token is wanted.
        last: place in the row of the last token of each.
        scored: documents with scored prompt tokens, and how many.
        rows: place of each token whose successor is scored.
        labels: id of that successor.
    """

    documents: list[Document]
    last: list[int]
    scored: list[tuple[Document, int]]
    rows: list[int]
    labels: list[int]

    @staticmethod
    def of(chunks: list[Chunk]) -> Wanted:
        """Find it for documents that lie end to end."""
        wanted, first = Wanted([], [], [], [], []), 0
        for document, count in chunks:
            span = range(max(document.unscored.start, document.computed),
                         min(document.unscored.stop, document.computed + count))  # fmt: skip
            if span:
                wanted.scored.append((document, len(span)))
                wanted.rows.extend(first + place - document.computed for place in span)
                wanted.labels.extend(document.tokens[span.start + 1 : span.stop + 1])
            first += count
            if count == document.remaining:
                wanted.documents.append(document)
                wanted.last.append(first - 1)
        return wanted

    @property
    def top_logprobs(self) -> int:
        """The likeliest ids that any of the documents wants in the place of its scored tokens."""
        return max((document.request.top_logprobs for document, _ in self.scored), default=0)


def tokens_of(chunks: list[Chunk]) -> list[int]:
    """Return the ids of a row: those of its documents end to end."""
    return [token for document, count in chunks
            for token in document.tokens[document.computed : document.computed + count]]  # fmt: skip


class Runner:
    """Model and memory, and the streams of the two paths; ids from `vocab_size` on are not told as the likeliest."""

    def __init__(
        self, model: HybridLM, memory: CacheMemory, options: EngineOptions, vocab_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._model, self._memory, self._vocab_size, self._ranks = model, memory, vocab_size, ranks
        if ranks.size > 1 and options.cuda_graphs is None:  # messages inside of graphs have not been tried on GPUs
            options = replace(options, cuda_graphs=False)
        recorded = records_decode(model, memory, options)
        self._graphs = DecodeGraphs(model, memory) if recorded else None
        self._mixed = MixedGraphs(model, memory) if recorded else None
        streams = memory.device.type == "cuda" and ranks.size == 1
        self._prefill, self._decode = (torch.cuda.Stream(memory.device) if streams else None for _ in range(2))

    @torch.no_grad()
    def run(self, step: Step) -> list[PathResult]:
        """Take the documents of a step further; what they have computed is for the caller to note.

        Raises:
            StepOutOfMemory: its tokens do not fit into the device's memory.
            OutOfDeviceMemory: likewise, where other ranks share the weights: they wait for this one in the middle of
                the step, and cannot be told.
        """
        paths = [path for path in self._paths(step) if path[1]]
        try:
            with self._together([stream for stream, _, _ in paths if stream is not None]):
                results = []
                for stream, chunks, run in paths:
                    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                        results.append(run(chunks))
                return results
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = sum(chunk.count for _, chunks, _ in paths for chunk in chunks)
            where = f"does not fit into the memory of {self._memory.device}"
            if self._ranks.size > 1:
                fix = "start again with less engine.prefill_tokens, or a smaller memory_share"
                raise OutOfDeviceMemory(
                    f"rank {self._ranks.rank}: a step of {tokens:,} tokens {where}; {fix}"
                ) from None
            raise StepOutOfMemory("engine.prefill_tokens", f"a step of {tokens:,} tokens", where,
                                  "give less, or a smaller memory_share") from None  # fmt: skip

    def _paths(self, step: Step) -> list[tuple[torch.cuda.Stream | None, list[Chunk], Path]]:
        """What a step runs: the stream of each pass, and its documents' pieces."""
        if self._mixed is not None and self._mixed.takes(step):
            return [(self._decode, [*step.decode, *step.prefill], lambda _: self._mixed_pass(step))]
        decode = self._pass if self._graphs is None else self._decode_pass
        return [(self._decode, step.decode, decode), (self._prefill, step.prefill, self._pass)]

    @contextlib.contextmanager
    def _together(self, streams: list[torch.cuda.Stream]) -> Iterator[None]:
        """Let streams begin after all that came before, and all that follows after them."""
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        try:
            yield
        finally:
            for stream in streams:
                torch.cuda.current_stream(self._memory.device).wait_stream(stream)

    def _pass(self, chunks: list[Chunk]) -> PathResult:
        """Take the documents of one path through the model, end to end in one row."""
        documents, counts = zip(*chunks, strict=True)
        keys = [document.computed + count for document, count in chunks]
        batch = DocumentBatch.of(
            counts, keys, [document.slot for document in documents], [document.pages for document in documents],
            self._memory.shape, self._memory.device,
        )  # fmt: skip
        given = given_of(chunks, self._memory.device)
        tokens_T = self._index(tokens_of(chunks))
        h_TD = self._model.final_states(tokens_T, batch.packing, self._memory.view(batch), given)
        wanted = Wanted.of(chunks)
        logits_NV = self._model.lm_head(h_TD[self._index(wanted.last)])
        return PathResult(wanted.documents, logits_NV, wanted.scored, self._scores(wanted, h_TD))

    def _decode_pass(self, chunks: list[Chunk]) -> PathResult:
        """Take documents that lack one token through a graph; without it where one's last token is an image's.

        The last token of a prompt has no score.
        """
        assert self._graphs is not None
        if show_images(chunks):
            return self._pass(chunks)
        documents = [chunk.document for chunk in chunks]
        return PathResult(documents, self._graphs.run(documents), [], None)

    def _mixed_pass(self, step: Step) -> PathResult:
        """Take decode steps and short pieces through one graph."""
        assert self._mixed is not None
        chunks = [*step.decode, *step.prefill]
        h_TD, logits_NV = self._mixed.run(step)
        done = [place for place, chunk in enumerate(chunks) if chunk.completes]
        if len(done) < len(chunks):
            logits_NV = logits_NV[self._index(done)]
        wanted = Wanted.of(chunks)
        return PathResult(wanted.documents, logits_NV, wanted.scored, self._scores(wanted, h_TD))

    def _scores(self, wanted: Wanted, h_TD: Tensor) -> LabelScores | None:
        """Scores of prompt tokens among a path's rows."""
        if not wanted.scored:
            return None
        labels = self._index(wanted.rows), self._index(wanted.labels)
        return label_scores(self._model, h_TD, *labels, wanted.top_logprobs, self._vocab_size)

    def _index(self, numbers: list[int]) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._memory.device)

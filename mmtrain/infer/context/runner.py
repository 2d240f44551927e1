"""Passes over the model by ranks that share the prompts' rows, with the same results on all of them.

Legend: T tokens of a row, N documents whose next token is wanted, M tokens that are scored, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.infer.context.batch import ContextBatch
from mmtrain.infer.context.exchange import join
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.document_images import given_of
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.runner import PathResult, Runner, Wanted, tokens_of
from mmtrain.infer.serving.scheduler import Chunk, Step
from mmtrain.infer.serving.scoring import LabelScores, label_scores
from mmtrain.model.model import HybridLM


class ContextRunner(Runner):
    """Model and memory of one rank.

    Each result is computed on one rank and given to all, so that all choose the same tokens.
    """

    def __init__(
        self, model: HybridLM, memory: CacheMemory, options: EngineOptions, vocab_size: int, context: ContextParallel
    ) -> None:  # fmt: skip
        super().__init__(model, memory, options, vocab_size)
        self._context = context

    def run(self, step: Step) -> list[PathResult]:
        """Take the documents of a step further, once all ranks have the same step.

        Raises:
            RanksDiffer: they do not; nothing was computed.
            StepOutOfMemory: its tokens do not fit into this rank's memory. Other ranks wait then until their group's
                time is over.
        """
        told = [
            (document.id, document.computed, count, document.slot, len(document.pages), document.pages[-1:],
             document.tokens[document.computed : document.computed + count],
             None if document.prompt_images is None else document.prompt_images.digests)
            for chunks in step for document, count in chunks
        ]  # fmt: skip
        self._context.check_same("the requests that they serve", repr(told), self._memory.device)
        return super().run(step)

    def _pass(self, chunks: list[Chunk]) -> PathResult:
        documents = [chunk.document for chunk in chunks]
        batch = ContextBatch.of(
            [chunk.count for chunk in chunks], [chunk.document.computed + chunk.count for chunk in chunks],
            [document.slot for document in documents], [document.pages for document in documents],
            self._memory.shape, self._memory.device, self._context,
        )  # fmt: skip
        tokens_T = self._index(tokens_of(chunks)[batch.span.start : batch.span.stop])
        given = given_of(chunks, self._memory.device, (batch.span.start, batch.span.stop))
        h_TD = self._model.final_states(tokens_T, batch.packing, self._memory.view(batch), given)
        wanted = Wanted.of(chunks)
        last = self._here(wanted.last, batch)
        mine_NV = self._model.lm_head(h_TD[self._index([wanted.last[n] - batch.span.start for n in last])])
        logits_NV = self._spread(mine_NV, last, len(wanted.last))
        scores = self._shared_scores(wanted, h_TD, batch) if wanted.scored else None
        return PathResult(wanted.documents, logits_NV, wanted.scored, scores)

    def _shared_scores(self, wanted: Wanted, h_TD: Tensor, batch: ContextBatch) -> LabelScores:
        """Scores of prompt tokens: each rank's own, or, where likeliest ids are told, those of all on every rank."""
        count, rows = len(wanted.rows), self._here(wanted.rows, batch)
        h_MD = h_TD[self._index([wanted.rows[m] - batch.span.start for m in rows])]
        if wanted.top_logprobs:
            whole_MD, every = self._spread(h_MD, rows, count), self._index(list(range(count)))
            given = whole_MD, every, self._index(wanted.labels), wanted.top_logprobs, self._vocab_size
            return label_scores(self._model, *given)
        here = self._index(list(range(len(rows))))
        mine = label_scores(self._model, h_MD, here, self._index([wanted.labels[m] for m in rows]))
        likeliest_M = self._spread(mine.likeliest_M.to(torch.uint8), rows, count).bool()
        return LabelScores(self._spread(mine.logprobs_M, rows, count), likeliest_M, [])

    def _spread(self, mine: Tensor, places: list[int], count: int) -> Tensor:
        """Bring rows that each rank has some of to all of them."""
        whole = mine.new_zeros(count, *mine.shape[1:])
        whole[self._index(places)] = mine
        return join(whole, self._context.group)

    @staticmethod
    def _here(places: list[int], batch: ContextBatch) -> list[int]:
        """Numbers of those places for which this rank gives the results."""
        return [n for n, place in enumerate(places) if place in batch.answers]

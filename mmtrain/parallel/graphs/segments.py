"""A model's forward pass cut at its softmax attention: what lies between has shapes that no document changes.

Softmax attention picks kernels by the lengths of documents, which the host knows. Everything else, lightning attention
too, reads where documents begin from the device, so its kernels are the same for all micro-batches of T tokens.

Legend: T tokens, D model width, H heads, K head dimension, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.model.block import Block
from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.model.model import HybridLM, LossOutput, ModelInputs, total_aux_loss
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable, rope_table
from mmtrain.model.weights import local
from mmtrain.parallel.units import UnitWatch


class SegmentInputs(NamedTuple):
    """What all segments of a micro-batch read, beside the hidden states.

    Attributes:
        packing: documents; of it segments read `cu_seqlens` alone.
        rope: cosines and sines of the tokens' positions.
        labels_T: next tokens, -100 ignored.
    """

    packing: Packing
    rope: RopeTable
    labels_T: Tensor

    @staticmethod
    def of(batch: ModelInputs, model: HybridLM) -> SegmentInputs:
        """The inputs of a micro-batch."""
        rope = rope_table(batch.packing.position_ids_T, model.config.rotary_dim, batch.rope_base)
        return SegmentInputs(batch.packing, rope, batch.labels_T)


class SegmentOutput(NamedTuple):
    """What a segment leaves.

    Attributes:
        passed: q, k, v and the residual of the softmax layer that follows; from the last one the summed loss.
        router: figures of its layers of experts.
    """

    passed: tuple[Tensor, ...]
    router: tuple[RouterStats, ...]

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """All that gradients come back for: what is passed, then the auxiliary loss of every layer of experts."""
        return *self.passed, *(stats.aux_loss for stats in self.router)

    def with_differentiable(self, tensors: Sequence[Tensor]) -> SegmentOutput:
        """The output with others in the places of :attr:`differentiable`, in its order."""
        count = len(self.passed)
        router = (stats._replace(aux_loss=loss) for stats, loss in zip(self.router, tensors[count:], strict=True))
        return SegmentOutput(tuple(tensors[:count]), tuple(router))

    def detached(self) -> SegmentOutput:
        """The same memory without autograd's graph."""
        router = (RouterStats(*(x.detach() for x in stats)) for stats in self.router)
        return SegmentOutput(tuple(x.detach() for x in self.passed), tuple(router))


@dataclass(frozen=True)
class Segment:
    """The model between one softmax attention and the next, or an end of the model.

    Attributes:
        model: the whole model.
        closes: softmax layer whose attention has just run; None in the first segment.
        blocks: layers that are whole inside.
        opens: softmax layer whose attention follows; None in the last segment, which computes the loss.
    """

    model: HybridLM
    closes: Block | None
    blocks: tuple[Block, ...]
    opens: Block | None

    def __call__(self, carried: Sequence[Tensor], inputs: SegmentInputs) -> SegmentOutput:
        """Run the segment.

        Args:
            carried: hidden states [T, D]; or the attention's result [T, H, K] and its layer's residual [T, D].
            inputs: of the micro-batch.
        """
        router: list[RouterStats] = []
        h_TD = carried[0]
        if self.closes is not None:
            h_TD, stats = self.closes.after_attention(*carried, inputs.packing)
            router += [stats] if stats is not None else []
        for block in self.blocks:
            h_TD, stats = block(h_TD, inputs.packing, inputs.rope)
            router += [stats] if stats is not None else []
        if self.opens is not None:
            passed = self.opens.before_attention(h_TD, inputs.rope)
        else:
            passed = (self._loss(h_TD, inputs.labels_T),)
        return SegmentOutput(passed, tuple(router))

    def _loss(self, h_TD: Tensor, labels_T: Tensor) -> Tensor:
        model = self.model
        return model.token_loss(model.norm(h_TD), local(model.lm_head.weight), labels_T, model.config.loss_chunk_tokens)


def cut(model: HybridLM) -> list[Segment]:
    """Cut a whole model at every softmax attention; a model without any is one segment."""
    found, closes, blocks = [], None, []
    for block in model.layers:
        if block.spec is SOFTMAX:
            found.append(Segment(model, closes, tuple(blocks), block))
            closes, blocks = block, []
        else:
            blocks.append(block)
    return [*found, Segment(model, closes, tuple(blocks), None)]


SegmentCall = Callable[[Sequence[Tensor], SegmentInputs], SegmentOutput]


def run_segments(
    model: HybridLM,
    segments: Sequence[Segment],
    calls: Sequence[SegmentCall],
    batch: ModelInputs,
    inputs: SegmentInputs,
    watch: UnitWatch | None = None,
) -> LossOutput:
    """Compute a micro-batch's loss as :meth:`HybridLM.forward` does, segment by segment.

    Args:
        model: the whole model.
        segments: of :func:`cut`.
        calls: what runs each segment: the segment itself, or a recording of it.
        batch: the micro-batch.
        inputs: what `calls` are given.
        watch: is told of every segment.
    """
    carried: tuple[Tensor, ...] = (model.embed_tokens(batch.tokens_T),)
    router: list[RouterStats] = []
    for segment, call in zip(segments, calls, strict=True):
        if watch is not None:
            watch.reach_segment(segment.closes, segment.opens, carried)
        out = call(carried, inputs)
        router += out.router
        carried = out.passed
        if segment.opens is not None:
            q_THK, k_TGK, v_TGK, residual_TD = out.passed
            o_THK = segment.opens.mixer.attention.softmax(q_THK, k_TGK, v_TGK, batch.packing)
            carried = (o_THK, residual_TD)
    ce_sum = carried[0]
    return LossOutput(ce_sum, total_aux_loss(router, torch.zeros_like(ce_sum)), router)

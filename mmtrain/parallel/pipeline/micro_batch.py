"""Order of the micro-batches of a step, without a pipeline, and the result that each leaves for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from mmtrain.config import ParallelConfig
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, LossOutput, ModelInputs, StageOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.fsdp import set_micro_batch


class MicroBatchResult(NamedTuple):
    """Figures of a micro-batch from some of the layers, without autograd's graph.

    Attributes:
        packing: of the micro-batch.
        layers: numbers of the layers, consecutive.
        out: the loss too, if the last layer is among them; otherwise `h_TD` is empty.
    """

    packing: Packing
    layers: range
    out: LossOutput | StageOutput


class Schedule(Protocol):
    """Forward and backward of a step's micro-batches in some order."""

    def train(
        self, batches: Iterable[ModelInputs], count: int, token_scale: Tensor, aux_divisor: float
    ) -> Iterable[MicroBatchResult]:
        """Run forward and backward of all micro-batches, as the results are asked for, and return those of each.

        Args:
            batches: `count` micro-batches.
            count: their number.
            token_scale: the loss is `ce_sum` times this, a scalar, plus the auxiliary losses of all layers.
            aux_divisor: of the auxiliary losses, summed over micro-batches.
        """

    def forward(self, batch: ModelInputs) -> Tensor | None:
        """Summed loss of one micro-batch; None on ranks that do not learn it."""

    def score(self, batch: ModelInputs) -> LabelScore | None:
        """Score of one micro-batch's labels; None on ranks that do not learn it."""


class SingleStage:
    """All layers on this rank: micro-batches one after another, each forward and backward."""

    def __init__(self, model: HybridLM, config: ParallelConfig) -> None:
        self.model, self.config = model, config

    def train(
        self, batches: Iterable[ModelInputs], count: int, token_scale: Tensor, aux_divisor: float
    ) -> Iterator[MicroBatchResult]:
        """Yield each micro-batch's result after its backward; the next is taken from `batches` only then."""
        layers = range(self.model.config.num_layers)
        for number, batch in enumerate(batches):
            set_micro_batch(self.model, self.config, last=number == count - 1)
            out = self.model(*batch)
            (out.ce_sum * token_scale + out.aux_loss / aux_divisor).backward()
            yield MicroBatchResult(batch.packing, layers, detached(out))

    def forward(self, batch: ModelInputs) -> Tensor:
        """Summed loss of one micro-batch."""
        return self.model(*batch).ce_sum

    def score(self, batch: ModelInputs) -> LabelScore:
        """Score of one micro-batch's labels."""
        return self.model(*batch, score=True)


def detached(out: LossOutput | StageOutput) -> LossOutput | StageOutput:
    """Figures of an output alone: no graph, and no hidden states."""
    router = [type(stats)(*(value.detach() for value in stats)) for stats in out.router]
    if isinstance(out, LossOutput):
        return LossOutput(out.ce_sum.detach(), out.aux_loss.detach(), router)
    return StageOutput(out.h_TD.new_empty(0), out.aux_loss.detach(), router)

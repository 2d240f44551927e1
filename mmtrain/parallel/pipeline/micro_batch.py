"""Order of the micro-batches of a step, without a pipeline, and the result that each leaves for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, LossOutput, ModelInputs, StageOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.model.preference import PairScore


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

    def score(self, batch: ModelInputs) -> LabelScore | PairScore | None:
        """Score of one micro-batch's labels, or of its pairs; None on ranks that do not learn it."""

    def close(self) -> None:
        """Free what is kept from one step to the next."""

    def peak_bytes(self) -> int:
        """The most that this rank's CUDA device has held for tensors and recorded graphs."""

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call."""


class WeightsInUse(Protocol):
    """The weights that modules compute with, and their gradients, while micro-batches run."""

    def micro_batch(self, first: bool, last: bool) -> AbstractContextManager[None]:
        """Forward and backward of one micro-batch run inside.

        Args:
            first: it is the step's first.
            last: it is the step's last: afterwards gradients are whole.
        """

    def forward_only(self) -> AbstractContextManager[None]:
        """A forward pass without gradients runs inside."""


class TrainingPass(Protocol):
    """The way from a micro-batch to its loss, which autograd differentiates."""

    def __call__(self, batch: ModelInputs) -> LossOutput:
        """Return the loss of a micro-batch."""

    def close(self) -> None:
        """Free what is kept from one micro-batch to the next."""

    def peak_bytes(self) -> int:
        """The most that this rank's CUDA device has held for it and all other tensors."""

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call."""


class PlainModel:
    """The model as it is, kernel by kernel."""

    def __init__(self, model: HybridLM) -> None:
        self._model = model

    def __call__(self, batch: ModelInputs) -> LossOutput:
        """Return the loss of a micro-batch."""
        return self._model(*batch)

    def close(self) -> None:
        """There is nothing to free."""

    def peak_bytes(self) -> int:
        """The most that this rank's CUDA device has held for tensors."""
        return torch.cuda.max_memory_allocated()

    def take_notes(self) -> list[str]:
        """There is nothing to tell."""
        return []


class SingleStage:
    """All layers on this rank: micro-batches one after another, each forward and backward.

    Args:
        model: the whole model.
        weights: it computes with.
        run: gives the model's loss of a micro-batch, for training.
    """

    def __init__(self, model: HybridLM, weights: WeightsInUse, run: TrainingPass) -> None:
        self.model, self.weights, self.run = model, weights, run

    def train(
        self, batches: Iterable[ModelInputs], count: int, token_scale: Tensor, aux_divisor: float
    ) -> Iterator[MicroBatchResult]:
        """Yield each micro-batch's result after its backward; the next is taken from `batches` only then."""
        layers = range(self.model.config.num_layers)
        for number, batch in enumerate(batches):
            with self.weights.micro_batch(first=number == 0, last=number == count - 1):
                out = self.run(batch)
                loss = out.ce_sum * token_scale + out.aux_loss / aux_divisor
                if loss.requires_grad:  # where eyes alone are trained, nothing does of rows without images
                    loss.backward()
            result = MicroBatchResult(batch.packing, layers, detached(out))
            del out, loss  # and with it what is left of autograd's graph
            yield result

    def forward(self, batch: ModelInputs) -> Tensor:
        """Summed loss of one micro-batch."""
        with self.weights.forward_only():
            return self.model(*batch).ce_sum

    def score(self, batch: ModelInputs) -> LabelScore | PairScore:
        """Score of one micro-batch's labels, or of its pairs."""
        with self.weights.forward_only():
            return self.model(*batch, score=True)

    def close(self) -> None:
        """Free what is kept from one micro-batch to the next."""
        self.run.close()

    def peak_bytes(self) -> int:
        """The most that this rank's CUDA device has held for tensors and recorded graphs."""
        return self.run.peak_bytes()

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call."""
        return self.run.take_notes()


def detached(out: LossOutput | StageOutput) -> LossOutput | StageOutput:
    """Figures of an output alone: no graph, and no hidden states."""
    router = [type(stats)(*(value.detach() for value in stats)) for stats in out.router]
    if isinstance(out, LossOutput):
        return LossOutput(out.ce_sum.detach(), out.aux_loss.detach(), router, _told(out), out.preference)
    return StageOutput(out.h_TD.new_empty(0), out.aux_loss.detach(), router)


def _told(out: LossOutput) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in out.figures.items()}

"""Scoring of samples by teacher forcing, in one forward pass each, under whatever layout the model has.

An answer is right when each of its tokens is the argmax of the logits after all tokens before it. Nothing is decoded.

Legend: T tokens of a sample, N samples of one length over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from mmtrain.evals.cell_score import CellScore
from mmtrain.evals.sample import Cell, Sample, SampleBuilder
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing


class Ranks(Protocol):
    """Ranks that share samples, as :class:`~mmtrain.parallel.mesh.ParallelContext` knows them."""

    device: torch.device

    @property
    def dp_rank(self) -> int:
        """Rank among those that have samples of their own."""

    @property
    def dp_size(self) -> int:
        """Number of those."""


class Scorer(Protocol):
    """What is scored: :class:`~mmtrain.parallel.parallel_model.ParallelModel`, or anything that answers like one."""

    context: Ranks

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode."""

    def score_labels(self, batch: ModelInputs) -> LabelScore | None:
        """Score of one row's labels; the parts that several ranks return add up to the row's."""

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum in place over the ranks that return parts or have other rows."""


def score_cells(
    model: Scorer, builder: SampleBuilder, cells: Sequence[Cell], samples: int, rope_base: float
) -> list[CellScore]:
    """Score all samples of some cells. Collective.

    Ranks of data parallelism take the samples in turn, one a micro-batch, each as many (sharded parameters are gathered
    together): surplus ones are not counted.

    Args:
        cells: all of one length, the same on every rank.
        samples: of each cell.
        rope_base: RoPE base of the phase.
    """
    numbered = [(cell, index) for cell in cells for index in range(samples)]
    rank, ranks, device = model.context.dp_rank, model.context.dp_size, model.context.device
    sums_N3 = torch.zeros(len(numbered), 3, dtype=torch.float64, device=device)
    with model.evaluating():
        for number in range(rank, -(-len(numbered) // ranks) * ranks, ranks):
            sample = builder.build(*numbered[min(number, len(numbered) - 1)])
            score = model.score_labels(sample_inputs(sample, rope_base, device))
            if score is not None and number < len(numbered):
                sums_N3[number] = torch.stack([figure.double() for figure in score])
    figures_3N = model.sum_over_ranks(sums_N3).cpu().T.tolist()
    return [
        CellScore.of_samples(cell, *(figure_N[samples * i : samples * (i + 1)] for figure_N in figures_3N))
        for i, cell in enumerate(cells)
    ]


def sample_inputs(sample: Sample, rope_base: float, device: torch.device) -> ModelInputs:
    """Return a sample as a micro-batch of one row with one document, on the device."""
    tokens_T, labels_T = (torch.from_numpy(array).to(device) for array in (sample.tokens_T, sample.labels_T))
    return ModelInputs(tokens_T, Packing.from_lengths([len(sample.tokens_T)], device), labels_T, rope_base)

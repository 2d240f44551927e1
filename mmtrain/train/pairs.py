"""Preference pairs on their way from the data to the model, and what a step says of them.

Legend: P pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from mmdata.images.batch import ImageBatch
from mmdata.rows.loader import PackedBatch
from mmtrain.errors import ConfigError
from mmtrain.model.packed_seq import to_device
from mmtrain.model.preference import PreferencePairs

LogProbs = tuple[float, float]
"""Log-probabilities of the chosen and of the rejected answer of a pair, in nats."""


def usable_pairs(batch: PackedBatch) -> list[int]:
    """Return which of a batch's pairs have labels on both answers: one whose image could not be had has not.

    Args:
        batch: on the host.
    """
    if not isinstance(batch, ImageBatch):
        return []
    learned_T = batch.loss_mask_BS.flatten()
    ends = enumerate(batch.pairs)
    return [
        i for i, (chosen, rejected, end) in ends if learned_T[chosen:rejected].any() and learned_T[rejected:end].any()
    ]


class References:
    """Log-probabilities of a run's pairs under its frozen reference, by `ImageBatch.pair_ids`.

    Args:
        beta: of the loss.
        log_probs: None for a pair whose image could not be had when they were computed; such a pair is left out. None
            for the whole takes every pair, with log-probabilities of 0: to compute them, or to measure speed.
    """

    def __init__(self, beta: float, log_probs: Mapping[str, LogProbs | None] | None = None) -> None:
        self.beta, self._log_probs = beta, log_probs

    def count(self, batch: PackedBatch) -> int:
        """Return the pairs of a batch that are learned from."""
        return len(self._learned(batch))

    def pairs_of(self, batch: PackedBatch, device: torch.device) -> PreferencePairs:
        """Return a batch's pairs that are learned from, on a device; there may be none.

        Args:
            batch: on the host.
            device: of the model.

        Raises:
            ConfigError: a pair has no log-probability of the reference.
        """
        learned = self._learned(batch)
        begins = [batch.pairs[i][:2] for i in learned] if isinstance(batch, ImageBatch) else []
        begin_P2 = torch.tensor(begins, dtype=batch.cu_seqlens.dtype).view(-1, 2)
        document_P2 = torch.searchsorted(batch.cu_seqlens[1:], begin_P2, right=True)
        reference_P2 = torch.tensor(list(learned.values()), dtype=torch.float64).view(-1, 2)
        return PreferencePairs(to_device(document_P2, device), to_device(reference_P2, device), self.beta)

    def _learned(self, batch: PackedBatch) -> dict[int, LogProbs]:
        """Return the reference of each pair that is learned from, by its place in the batch."""
        found: dict[int, LogProbs] = {}
        for i in usable_pairs(batch):
            known = (0.0, 0.0) if self._log_probs is None else self._known(batch.pair_ids[i])
            if known is not None:
                found[i] = known
        return found

    def _known(self, name: str) -> LogProbs | None:
        assert self._log_probs is not None
        if name not in self._log_probs:
            raise ConfigError("data.sources", name, "the reference knows no such pair: its log-probabilities are of "
                              "another corpus", "give that corpus, or another run.name")  # fmt: skip
        return self._log_probs[name]


@dataclass(frozen=True)
class PairFigures:
    """Figures of preference pairs, over all ranks.

    Attributes:
        pairs: their number.
        pair_accuracy: share whose chosen answer has the larger implicit reward.
        pair_margin: mean reward of the chosen answer less that of the rejected one.
        reward_chosen: mean of beta times what the chosen answer's log-probability gained on the reference, in nats.
        reward_rejected: the same of the rejected answer.
    """

    pairs: int
    pair_accuracy: float
    pair_margin: float
    reward_chosen: float
    reward_rejected: float

    @staticmethod
    def of(sums: Sequence[float]) -> PairFigures:
        """Return the figures, given sums over pairs in the order of `mmtrain.model.preference.FIGURES`."""
        pairs, *rest = sums
        return PairFigures(int(pairs), *(one / max(pairs, 1.0) for one in rest))

    def record(self, prefix: str = "") -> dict[str, float]:
        """Return them by name, for metrics."""
        return {prefix + name: value for name, value in asdict(self).items()}

"""Direct preference optimisation: the loss of pairs of documents, one preferred to the other (Rafailov et al. 2023).

The loss of a pair is -log sigmoid(beta ((p_c - p_r) - (q_c - q_r))), where p are log-probabilities of the chosen and
the rejected document under the model, and q under the model that training began with (their equation 7).

Legend: N documents, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferencePairs(NamedTuple):
    """Pairs among the documents of a micro-batch; both documents of a pair are in it.

    Attributes:
        document_P2: int64, numbers of the chosen and of the rejected document.
        reference_P2: float64, log-probabilities of their labels under the frozen reference, in nats, summed over each.
        beta: how far the model may go from the reference; above 0, 0.1 in the paper.
    """

    document_P2: Tensor
    reference_P2: Tensor
    beta: float


class PairScore(NamedTuple):
    """Log-probabilities of the pairs of a micro-batch.

    Attributes:
        log_prob_P2: float64, of the labels of the chosen and of the rejected documents, in nats, summed over each.
    """

    log_prob_P2: Tensor


class PreferenceLoss(NamedTuple):
    """Sums over the pairs of a micro-batch, which add up over micro-batches and ranks.

    Attributes:
        loss: float64 scalar, in nats, with autograd's graph.
        pairs: int64 scalar, their number.
        correct: int64 scalar, pairs whose chosen document has the larger implicit reward.
        margin: float64 scalar, reward of the chosen documents less that of the rejected ones.
        rewards_2: float64, rewards beta (p - q) of the chosen and of the rejected documents.
    """

    loss: Tensor
    pairs: Tensor
    correct: Tensor
    margin: Tensor
    rewards_2: Tensor

    @property
    def figures(self) -> Tensor:
        """Pairs, correct ones, margin, and rewards of the chosen and of the rejected; float64 [5], without a graph."""
        told = torch.stack([self.pairs.double(), self.correct.double(), self.margin.double()])
        return torch.cat([told, self.rewards_2.double()])


FIGURES = ("pairs", "correct", "margin", "chosen", "rejected")
"""Names of `PreferenceLoss.figures`."""


def pair_scores(log_prob_N: Tensor, pairs: PreferencePairs) -> PairScore:
    """Return the log-probabilities of pairs, given those of all documents of the micro-batch.

    Args:
        log_prob_N: float64, of each document's labels (`mmtrain.model.document_score`). Documents of no pair, padding
            say, get no gradient.
        pairs: of the micro-batch; there may be none.
    """
    return PairScore(log_prob_N[pairs.document_P2])


def preference_loss(score: PairScore, pairs: PreferencePairs) -> PreferenceLoss:
    """Return the loss of all pairs, and figures of their implicit rewards."""
    reward_P2 = pairs.beta * (score.log_prob_P2 - pairs.reference_P2.detach())
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    loss = -F.logsigmoid(margin_P).sum()
    told_P2, told_P = reward_P2.detach(), margin_P.detach()
    count = torch.tensor(len(told_P), dtype=torch.int64, device=told_P.device)
    return PreferenceLoss(loss, count, (told_P > 0).sum(), told_P.sum(), told_P2.sum(0))


def told_once(loss: Tensor, speaks: bool) -> Tensor:
    """Return a loss whose value counts on one of the ranks that compute it alike, and whose gradient does on all.

    Args:
        loss: scalar; every rank has the gradient of its own part of what the loss follows from.
        speaks: whether this rank is the one.
    """
    return loss if speaks else loss - loss.detach()

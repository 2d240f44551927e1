"""Pairs of images and captions of all replicas as one batch of the contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.model.model import HybridLM
from mmtrain.parallel.collectives import gather_rows
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.vision.contrastive_model import ContrastiveModel


@dataclass(frozen=True)
class ReplicaPairs:
    """The ranks of a group, each with pairs of its own.

    Attributes:
        group: the ranks.
    """

    group: ProcessGroup

    @property
    def ranks(self) -> int:
        """Number of them."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This one among them."""
        return self.group.rank()

    def gather(self, x_ME: Tensor) -> Tensor:
        """Rows of all ranks, [W M, E]; backward sums the ranks' gradients of this rank's rows."""
        return gather_rows(x_ME, self.group)


def share_pairs(model: HybridLM, context: ParallelContext) -> None:
    """Let a model with a contrastive loss see the pairs of all replicas; others are left as they are."""
    if isinstance(model, ContrastiveModel):
        model.contrastive.pair_ranks = ReplicaPairs(context.replicas.get_group())

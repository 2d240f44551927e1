"""The process groups that experts' rows travel along, and this rank's places in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ExpertGroups:
    """Process groups of the experts' exchange. They belong to the meshes, which outlive an exchange.

    Attributes:
        ep_group: ranks that hold different experts.
        etp_group: ranks that hold slices of the same experts.
        ep_etp_group: ranks of both axes, etp inside: together they hold all experts once.
        tp_group: ranks of tensor parallelism, which hold parts of one micro-batch.
        ep_rank: this rank along ep.
        etp_rank: this rank along etp.
    """

    ep_group: ProcessGroup
    etp_group: ProcessGroup
    ep_etp_group: ProcessGroup
    tp_group: ProcessGroup
    ep_rank: int
    etp_rank: int

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, tp_group: ProcessGroup) -> ExpertGroups:
        """Groups of a mesh with the axes ep and etp. COLLECTIVE: the mesh makes the group of both axes once."""
        ep, etp = mesh["ep"], mesh["etp"]
        return cls(ep.get_group(), etp.get_group(), mesh._flatten().get_group(), tp_group,
                   ep.get_local_rank(), etp.get_local_rank())  # fmt: skip

    @property
    def ep_size(self) -> int:
        """Ranks along ep."""
        return self.ep_group.size()

    @property
    def etp_size(self) -> int:
        """Ranks along etp."""
        return self.etp_group.size()

    @property
    def etp_is_tp(self) -> bool:
        """Whether the ranks that hold slices of an expert are those that hold parts of one micro-batch."""
        return dist.get_process_group_ranks(self.tp_group) == dist.get_process_group_ranks(self.etp_group)

"""Host memory of a run's phases: predicted, and refused where a host's ranks cannot have it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mmtrain.config import PretrainConfig
from mmtrain.config.process_env import read_processes
from mmtrain.errors import ConfigError
from mmtrain.parallel.memory.host import HostMemory, host_memory
from mmtrain.parallel.memory.predict import GIB
from mmtrain.parallel.memory.system import host_bytes
from mmtrain.parallel.memory.workload import Workload


@dataclass(frozen=True)
class PhaseHostMemory:
    """What each phase needs of a host, and what there is.

    Attributes:
        names: of the phases.
        works: the phases as memory sees them.
        needs: of one rank.
        ranks: of a host.
        host_bytes: memory of a host; None where it is not known, or where there is no other than the device's.
        copies_checkpoints: checkpoints are written from a copy in host memory.
    """

    names: Sequence[str]
    works: Sequence[Workload]
    needs: Sequence[HostMemory]
    ranks: int
    host_bytes: float | None
    copies_checkpoints: bool

    @staticmethod
    def of(
        config: PretrainConfig, names: Sequence[str], works: Sequence[Workload], device: torch.device
    ) -> PhaseHostMemory:
        """Predict all phases.

        Args:
            config: every option; `cluster.host_memory_gib` plans for a host that is not here.
            names: of the phases.
            works: the phases as memory sees them.
            device: of this process.
        """
        copies, known = config.checkpoint.asynchronous, config.cluster.host_memory_gib
        there = known * GIB if known is not None else host_bytes() if device.type == "cuda" else None
        needs = [host_memory(work, copies) for work in works]
        return PhaseHostMemory(names, works, needs, _ranks_of_a_host(config, works), there, copies)

    def check(self) -> None:
        """Refuse phases whose ranks need more than a host has.

        Raises:
            ConfigError: the first of them, with the number of blocks whose inputs do fit.
        """
        for i, (name, need) in enumerate(zip(self.names, self.needs, strict=True)):
            if self.host_bytes is not None and need.whole * self.ranks > self.host_bytes:
                raise ConfigError(f"stage.phases[{i}]", name, f"needs {self._needed(need)}", self._what_fits(i))

    def lines(self) -> list[str]:
        """Return a line for each phase that offloads something."""
        pairs = zip(self.names, self.needs, strict=True)
        return [f"host    {name}: {self._needed(need)}" for name, need in pairs if need.block_inputs or need.optimizer]

    def _needed(self, need: HostMemory) -> str:
        there = "" if self.host_bytes is None else f" of {self.host_bytes / GIB:.1f}"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return (f"{need.whole / GIB:.1f} GiB of host memory a rank predicted ({need}); "
                f"{ranks} of a host: {self.ranks * need.whole / GIB:.1f}{there}")  # fmt: skip

    def _what_fits(self, i: int) -> str:
        work, need, fewer = self.works[i], self.needs[i], "take more hosts"
        if need.checkpoint:
            fewer += f", or give checkpoint.asynchronous=false ({need.checkpoint / GIB:.1f} GiB a rank less)"
        for number in range(work.model.num_layers - 1, 0, -1) if need.block_inputs else ():
            parallel = replace(work.parallel, offload_block_inputs=number)
            less = host_memory(replace(work, parallel=parallel), self.copies_checkpoints)
            if less.whole * self.ranks <= (self.host_bytes or 0.0):
                return f"give parallel.offload_block_inputs={number}, or {fewer}"
        return fewer


def _ranks_of_a_host(config: PretrainConfig, works: Sequence[Workload]) -> int:
    """Those that were started on this one; for a plan of more processes than there are, those of a node."""
    world, processes = works[0].layout.world, read_processes()
    if processes.world_size == world and processes.local_world_size:
        return processes.local_world_size
    return min(world, config.cluster.node_processes)

"""Host memory of a rank: what waits there for backward, an optimizer that runs there, and the copy of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.parallel.memory.activations import layer_activations
from mmtrain.parallel.memory.predict import GIB, micro_batches_in_flight
from mmtrain.parallel.memory.workload import FP32, Workload, layer_parameters, root_parameters, stage_layers


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the worst rank.

    Attributes:
        block_inputs: of `parallel.offload_block_inputs`, pinned.
        optimizer: parameters, gradients and moments of an optimizer that runs there.
        checkpoint: the copy from which a checkpoint is written while the run goes on.
    """

    block_inputs: float = 0.0
    optimizer: float = 0.0
    checkpoint: float = 0.0

    @property
    def whole(self) -> float:
        """All of it."""
        return self.block_inputs + self.optimizer + self.checkpoint

    def __str__(self) -> str:
        parts = {"block inputs": self.block_inputs, "optimizer": self.optimizer, "checkpoint": self.checkpoint}
        return ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value)


def host_memory(work: Workload, copies_checkpoints: bool) -> HostMemory:
    """Predict the host memory of the worst rank of a phase.

    Args:
        work: the phase.
        copies_checkpoints: checkpoints are written from a copy (`checkpoint.asynchronous`).
    """
    return max((_of_rank(work, rank, copies_checkpoints) for rank in range(work.layout.pp)), key=lambda one: one.whole)


def _of_rank(work: Workload, pp_rank: int, copies_checkpoints: bool) -> HostMemory:
    model, layout = work.model, work.layout
    letters = [model.layer_types[layer] for part in stage_layers(work, pp_rank) for layer in part]
    offloaded = [letter for number, letter in enumerate(letters) if work.parallel.offloads(number)]
    inputs = sum(_pinned(layer_activations(work, letter).block_input) for letter in offloaded)
    root = root_parameters(model, layout, pp_rank == 0, pp_rank == layout.pp - 1)
    elements = sum((layer_parameters(model, layout, letter) for letter in letters), root).sharded(layout)
    return HostMemory(
        block_inputs=micro_batches_in_flight(work, pp_rank) * inputs,
        optimizer=4 * FP32 * elements if work.host_optimizer else 0.0,
        checkpoint=3 * FP32 * elements if copies_checkpoints else 0.0,
    )


def _pinned(size: float) -> int:
    """Bytes that torch pins for a tensor: a power of two."""
    return 1 << max(0, int(size) - 1).bit_length()

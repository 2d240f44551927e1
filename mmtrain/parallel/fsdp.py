"""What FSDP keeps on a rank between the micro-batches of a step."""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule

from mmtrain.config import ParallelConfig


def set_micro_batch(model: FSDPModule, config: ParallelConfig, last: bool) -> None:
    """Say what the next backward does with gradients and gathered parameters; `last`: it is the step's last.

    Gradients are reduced over ranks, or kept whole until the last micro-batch. Parameters that forward keeps gathered
    (ZeRO-1 and 2) stay gathered until then too: they change between steps alone.
    """
    model.set_requires_gradient_sync(last or config.sync_every_micro_batch)
    model.set_reshard_after_backward(last or config.reshard_after_forward)

"""A checkpoint opened by the processes that are to serve it together: for launchers, and tools that drive an engine.

    with open_model(Path("runs/x"), RankLayout(tp=2)) as opened:
        opened.run(EngineOptions(), lambda engine: engine.generate(requests))  # called on rank 0; the others follow

One process, or the ranks that torchrun started on a host, run the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig
from mmtrain.config.process_env import read_processes
from mmtrain.errors import ConfigError
from mmtrain.infer import load
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.device import choose_device
from mmtrain.infer.engine import Engine
from mmtrain.infer.layout import ALONE_LAYOUT, RankLayout
from mmtrain.infer.load import OpenedCheckpoint
from mmtrain.infer.serving.follow import run_engine
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import ALONE, ManyRanks, Ranks
from mmtrain.model.model import HybridLM
from mmtrain.parallel import mesh

T = TypeVar("T")
_MINUTES = 24 * 60.0  # that ranks wait while the first one verifies a checkpoint, which may have terabytes


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint, and the ranks that share its model.

    Attributes:
        checkpoint: all of it but its weights.
        ranks: the processes.
        device: of this one.
        precision: as :func:`~mmtrain.infer.load.load_weights` takes it.
        context: the ranks, where they share keys and each has all weights.
    """

    checkpoint: OpenedCheckpoint
    ranks: Ranks
    device: torch.device
    precision: str = "fp32"
    context: ContextParallel | None = None

    @property
    def place(self) -> str:
        """Where the model is, for a line that sums something up."""
        return str(self.device) if self.ranks.size == 1 else f"{self.ranks.size} ranks ({self.device.type})"

    def load(self) -> HybridLM:
        """Read this rank's part of the weights. Collective.

        Raises:
            ConfigError: as :func:`~mmtrain.infer.load.load_weights` raises it, on all ranks alike.
        """
        return load.load_weights(self.checkpoint, self.device, self.precision, self.ranks)

    def run(self, options: EngineOptions | None, use: Callable[[Engine], T], model: HybridLM | None = None) -> T | None:
        """Make an engine on every rank, of which rank 0 uses its own (`mmtrain.infer.serving.follow`). Collective.

        Args:
            options: of the engine; rank 0's count.
            use: called on rank 0 alone.
            model: as :meth:`load` returned it; None loads it.

        Returns:
            What `use` returned, on rank 0; None on the others.

        Raises:
            ConfigError, OutOfDeviceMemory: see there.
        """
        return run_engine(self.ranks, model or self.load(), self.checkpoint.tokenizer, options, use, self.context)


@contextmanager
def open_model(
    path: Path,
    layout: RankLayout = ALONE_LAYOUT,
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    rope_base: float | None = None,
    precision: str = "fp32",
    verify: bool = True,
) -> Iterator[OpenModel]:
    """Open a checkpoint on the ranks of a layout, which leave each other at the end of the `with`. Collective.

    Rank 0 finds and verifies it; the others open the same one. Nothing is joined, and no weight is read, before the
    layout is known to fit.

    Args:
        path: a run folder, one of its checkpoints, or a Hugging Face folder.
        layout: sizes of the axes.
        tokenizer, rope_base, verify: as :func:`~mmtrain.infer.load.open_checkpoint` takes them.
        device: as :func:`~mmtrain.infer.device.choose_device` takes it; ranks have a GPU each: cpu, cuda or None.
        precision: as :func:`~mmtrain.infer.load.load_weights` takes it.

    Raises:
        ConfigError: a number of processes, a size, a device or the checkpoint is wrong.
        DataError: the tokenizer that was given is missing or broken.
    """
    layout.check_processes()
    if layout.ranks == 1:
        chosen = choose_device(device)
        yield OpenModel(load.open_checkpoint(path, tokenizer, rope_base, verify), ALONE, chosen, precision)
        return
    cluster = _cluster(device)
    mesh.pick_device(cluster)  # refused before ranks meet
    world = mesh.join(cluster)
    checkpoint = _open_on_all(world, path, tokenizer, rope_base, verify)
    planned = layout.plan(checkpoint.model)
    context = world.lay_out(planned)
    try:
        keys = ContextParallel(dist.group.WORLD) if layout.cp > 1 else None
        yield OpenModel(checkpoint, ManyRanks(context), context.device, precision, keys)
    finally:
        mesh.stop()


def _cluster(device: str | None) -> ClusterConfig:
    """Options of the processes' meeting; a GPU's number is refused."""
    if device not in (None, "cpu", "cuda"):
        raise ConfigError("--device", device, "ranks have a GPU each, by their number on this host", "give cuda")
    return ClusterConfig(device=device or "auto", timeout_minutes=_MINUTES)


def _open_on_all(
    world: mesh.World, path: Path, tokenizer: str | None, rope_base: float | None, verify: bool
) -> OpenedCheckpoint:
    """Open what rank 0 finds, so that its bytes are verified once."""
    if read_processes().rank > 0:
        found = world.of_main("checkpoint", "")
        if not found:
            raise ConfigError("checkpoint", path, "was refused by rank 0", "see its message")
        return load.open_checkpoint(Path(found), tokenizer, rope_base, verify=False)
    try:
        opened = load.open_checkpoint(path, tokenizer, rope_base, verify)
    except BaseException:
        world.of_main("checkpoint", "")
        raise
    world.of_main("checkpoint", str(opened.path))
    return opened

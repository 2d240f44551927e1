#!/usr/bin/env python
"""Loading of a checkpoint under the layout that saved it and under another, beside torch's own way.

    torchrun --nproc-per-node 2 -m mmtrain.bench.resharding --model proxy_100m --out DIR --under parallel.tp=2

A state is saved under data parallelism over all processes, by us and by `dcp.save`. Both are loaded there, and then,
in the same processes, by a model that is laid out otherwise. Ours reads all bytes against their checksums before, as a
run does. Figures are those of the slowest rank and go to DIR/resharding.json as they come; the page cache holds the
files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import torch.distributed.checkpoint as dcp

from mmtrain.bench.plain_files import read_files
from mmtrain.bench.saved_training import Figures, Training, options_of, parser_of, seconds
from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.manifest import read_manifest
from mmtrain.checkpoint.verify import damage_of_tensors, shards_of
from mmtrain.config import ClusterConfig
from mmtrain.config.process_env import read_processes
from mmtrain.errors import ConfigError
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout

TOKENS = 64  # of the step that gives the state its moments


def loads(training: Training, scratch: Path, where: str, repeats: int, figures: Figures) -> None:
    """Keep the seconds of verified loads of ours, and of loads by `dcp.load`, in turns."""
    path, device = scratch / "ours/step-00000001", training.context.device

    def ours() -> None:
        if (damage := damage_of_tensors(path)) is not None:
            raise RuntimeError(damage)
        load_checkpoint(path, training.model.module, training.optimizer)

    ways: dict[str, Callable[[], None]] = {"ours": ours, "dcp": lambda: training.load_state(scratch / "dcp")}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, load in ways.items():
            found[name].append(seconds(load, device))
    for name, took in found.items():
        figures.keep(f"{name}_{where}_s", took)


def measure(world: mesh.World, model: str, under: list[str], scratch: Path, repeats: int, out: Path) -> None:
    """Save under data parallelism, load there and under another layout, and write the figures as they come."""
    config = options_of(model, under)
    layout = plan_layout(read_processes().world_size, config.parallel, config.model)
    training = Training(world.lay_out(), model, TOKENS)
    figures = Figures(training, out / "resharding.json")
    figures.keep("under", str(layout))
    training.step()
    training.begin(scratch / "ours", None).finish()
    dcp.save(training.state(), checkpoint_id=scratch / "dcp")
    path, rank, ranks = scratch / "ours/step-00000001", training.context.rank, read_processes().world_size
    names = shards_of(read_manifest(path))
    figures.keep("bytes", sum((path / name).stat().st_size for name in names))
    mine = [path / name for name in names[rank::ranks]]
    figures.keep("read_s", [seconds(lambda: read_files(mine), training.context.device) for _ in range(repeats)])
    loads(training, scratch, "same", repeats, figures)
    mesh.stop()
    training = Training(world.lay_out(layout), model, TOKENS, config.parallel)
    loads(training, scratch, "other", repeats, figures)


def main() -> None:
    """Run on the processes of the launcher.

    Raises:
        ConfigError: the other layout cannot be had with these processes and this model.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--under", nargs="+", default=["parallel.tp=2"], help="options of the other layout")
    given = parser.parse_args()
    if given.repeats < 1:
        raise ConfigError("--repeats", given.repeats, "must be at least 1", "leave it out")
    warnings.simplefilter("ignore")
    world, scratch = mesh.join(ClusterConfig(device=given.device)), given.scratch or given.out / "scratch"
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        measure(world, given.model, given.under, scratch, given.repeats, given.out)
        on_main(lambda: rmtree(scratch))
    finally:
        mesh.stop()


if __name__ == "__main__":
    main()

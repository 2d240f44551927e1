#!/usr/bin/env python
"""Export of a checkpoint to a Hugging Face folder and import of one, beside a plain copy of the same bytes.

`torchrun --nproc-per-node N -m mmtrain.bench.hugging_face --model proxy_100m --out DIR`, on CPUs or GPUs. Rank 0
exports, all ranks import, each its part of a model under FSDP. Figures are those of the slowest rank and go to
DIR/hugging_face.json as they come.

The page cache holds what was written, so all of it reads from memory unless the bytes exceed it. A copy is brought to
the disk, as an export is; both are made in turns, and what was written before is removed from the disk before either
begins.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from mmtrain.bench.checkpoint import run
from mmtrain.bench.plain_files import copy_files
from mmtrain.bench.saved_training import Figures, Training, parser_of, seconds
from mmtrain.checkpoint.agreement import on_main
from mmtrain.hf.export import export
from mmtrain.hf.folder import check_folder
from mmtrain.hf.read_weights import load_folder
from mmtrain.hf.sources import CheckpointWeights
from mmtrain.hf.target import DTYPES, TARGETS, Target

FORMATS = ("hf", "minimax")
TOKENS = 64  # of the step that gives the checkpoint its moments


def measure(training: Training, out: Path, scratch: Path, repeats: int) -> None:
    """Measure all, and write it as it comes."""
    device, rank, model = training.context.device, dist.get_rank(), training.config
    keep = Figures(training, out / "hugging_face.json").keep

    def clear(folder: Path) -> None:
        def remove() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()

        on_main(remove)

    def timed(call: Callable[[], object]) -> list[float]:
        return [seconds(call, device) for _ in range(repeats)]

    training.step()
    training.begin(scratch / "ours", None).finish()
    checkpoint = scratch / "ours/step-00000001"
    for name in FORMATS:
        for dtype in DTYPES:
            folder, copied = scratch / f"{name}-{dtype}", scratch / "copy"

            def write(to: Target = TARGETS[name], dtype: str = dtype, folder: Path = folder) -> None:
                weights = CheckpointWeights(checkpoint)
                on_main(lambda: export(model, weights, to, folder, DTYPES[dtype]) and None)

            def copy(folder: Path = folder, copied: Path = copied) -> None:
                copy_files(sorted(folder.glob("*.safetensors")) if rank == 0 else [], copied)

            exports, copies = [], []
            for _ in range(repeats):
                clear(folder)
                exports.append(seconds(write, device))
                clear(copied)
                copies.append(seconds(copy, device))
            clear(copied)
            keep(f"export_{name}_{dtype}_s", exports)
            keep(f"bytes_{name}_{dtype}", sum(file.stat().st_size for file in folder.glob("*.safetensors")))
            keep(f"copy_{name}_{dtype}_s", copies)
            keep(f"speed_of_a_copy_{name}_{dtype}", statistics.median(copies) / statistics.median(exports))

            def read(folder: Path = folder) -> None:
                load_folder("folder", check_folder("folder", folder, model), training.model.module)

            keep(f"import_{name}_{dtype}_s", timed(read))
            clear(folder)


def main() -> None:
    """Run on the processes of the launcher."""
    given = parser_of(__doc__).parse_args()
    run(given, TOKENS, lambda training, scratch: measure(training, given.out, scratch, given.repeats))


if __name__ == "__main__":
    main()

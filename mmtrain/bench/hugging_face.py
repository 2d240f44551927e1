#!/usr/bin/env python
"""Export of a checkpoint to a Hugging Face folder and import of one, beside a plain copy of the same bytes.

`torchrun --nproc-per-node N -m mmtrain.bench.hugging_face --model proxy_100m --out DIR`, on CPUs or GPUs. Rank 0
exports, all ranks import, each its part of a model under FSDP. Figures are those of the slowest rank and go to
DIR/hugging_face.json as they come.

The page cache holds what was written, so all of it reads from memory unless the bytes exceed it. A copy is brought to
the disk, as an export is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from mmtrain.bench.checkpoint import Figures, Training, copy_files, parser_of, run, seconds
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
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))

    def timed(call: Callable[[], object], *folders: Path) -> list[float]:
        took = []
        for _ in range(repeats):
            for folder in folders:
                clear(folder)
            took.append(seconds(call, device))
        return took

    training.step()
    training.begin(scratch / "ours", None).finish()
    checkpoint = scratch / "ours/step-00000001"
    for name in FORMATS:
        for dtype in DTYPES:
            folder, copied = scratch / f"{name}-{dtype}", scratch / "copy"

            def write(to: Target = TARGETS[name], dtype: str = dtype, folder: Path = folder) -> None:
                weights = CheckpointWeights(checkpoint)
                on_main(lambda: export(model, weights, to, folder, DTYPES[dtype]) and None)

            keep(f"export_{name}_{dtype}_s", timed(write, folder))
            files = sorted(folder.glob("*.safetensors"))
            keep(f"bytes_{name}_{dtype}", sum(file.stat().st_size for file in files))
            mine = files if rank == 0 else []
            keep(f"copy_{name}_{dtype}_s", timed(lambda mine=mine, copied=copied: copy_files(mine, copied), copied))

            def read(folder: Path = folder) -> None:
                load_folder("folder", check_folder("folder", folder, model), training.model.module)

            keep(f"import_{name}_{dtype}_s", timed(read))
            clear(folder)
            clear(copied)


def main() -> None:
    """Run on the processes of the launcher."""
    given = parser_of(__doc__).parse_args()
    run(given, TOKENS, lambda training, scratch: measure(training, given.out, scratch, given.repeats))


if __name__ == "__main__":
    main()

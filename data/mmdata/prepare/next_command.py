"""The command that trains a first model on a corpus, sized by the corpus and by the machine, fit to be pasted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from mmdata.corpus.manifest import Manifest
from mmdata.prepare.pool import cores

# Of configs/stage/quickstart.yaml and configs/model/tiny.yaml.
_TOKENS, _ROWS, _SEQ_LEN, _VOCAB = 960 << 10, 16, 512, 4096
_EPOCHS = 4  # a text read more often than this teaches little more
_LEAST_SCALE = 16  # a run of 1/16 still has seven steps
_HYDRA_PLAIN = re.compile(r"[A-Za-z/._-][A-Za-z0-9/._-]*")  # what Hydra reads as text without quotes


def next_command(manifest: Manifest, output: Path, script: str = "launch/pretrain.py", gpus: int | None = None) -> str:
    """Command line of a first run: the quickstart stage on all GPUs, or on the CPU in two processes.

    Args:
        manifest: of the corpus.
        output: its folder.
        script: what torchrun runs, as words of a shell: a path, or `-m mmtrain pretrain`.
        gpus: GPUs to use; None looks for them.
    """
    available = gpu_count() if gpus is None else gpus
    processes = max(n for n in (1, 2, 4, 8, 16) if n <= max(available or min(cores(), 2), 1))
    tokens = manifest.splits["train"].tokens
    overrides = ["+stage=quickstart", f"data.path={hydra_quoted(str(output))}", f"run.name={_free_name()}"]
    if manifest.vocab_size != _VOCAB:
        overrides.append(f"model.vocab_size={-(-manifest.vocab_size // 64) * 64}")
    if (seq_len := _seq_len(tokens)) != _SEQ_LEN:
        overrides.append(f"stage.phases.0.seq_len={seq_len}")
    if (shrink := _shrink(tokens)) > 1:
        overrides.append(f"stage.token_scale={1 / shrink:g}")
    rows = _ROWS * _SEQ_LEN // seq_len // processes
    overrides.append(f"parallel.micro_batch_rows={min(rows, 8 * _SEQ_LEN // seq_len)}")
    return " ".join([_torchrun(), f"--standalone --nproc-per-node {processes}", script, *map(shlex.quote, overrides)])


def hydra_quoted(value: str) -> str:
    """Value of an override that Hydra reads as this very text, whatever is in it."""
    if _HYDRA_PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf", "-inf"):
        return value
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{escaped}"'.replace("${", "\\${")


def gpu_count() -> int:
    """Number of GPUs that torch sees; 0 without torch."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def _seq_len(tokens: int) -> int:
    """Length of a row that even a small text fills several times."""
    return min(_SEQ_LEN, max(16, 1 << max(tokens // 4, 1).bit_length() - 1))


def _shrink(tokens: int) -> int:
    """Power of two to divide the quickstart's tokens by, so that a small text is read about `_EPOCHS` times."""
    shrink = 1
    while shrink < _LEAST_SCALE and _TOKENS // shrink > _EPOCHS * tokens:
        shrink *= 2
    return shrink


def _torchrun() -> str:
    """`torchrun`, or how this very Python runs it where another or none is found by that name."""
    python = Path(sys.executable)
    found = shutil.which("torchrun")
    if found is not None and Path(found).parent == python.parent:
        return "torchrun"
    path = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
    return f"{shlex.quote(path)} -m torch.distributed.run"


def _free_name() -> str:
    """`first`, or with a number that no run of this folder has."""
    names = ["first", *(f"first_{i}" for i in range(2, 1000))]
    return next((name for name in names if not Path("runs", name).exists()), names[0])

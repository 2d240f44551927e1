#!/usr/bin/env python
r"""Export a checkpoint to a Hugging Face folder, or write such a folder anew in another format.

    python launch/convert.py runs/first out/first --to hf
    python launch/convert.py runs/first/checkpoints/step-00001000 out/first-vllm --to minimax --dtype bfloat16
    python launch/convert.py MiniMax-Text-01 out/text-01-hf --to hf

--to hf is for transformers (MiniMaxForCausalLM; the tensor names that its `save_pretrained` writes), hf-stacked for
transformers 5 alone (experts as it stacks them in memory, which loads faster), minimax for vLLM and the released code.
A model with eyes is written in the layout of MiniMax-VL-01, by minimax alone.

There is nothing to convert in the other direction: `launch/pretrain.py run.init_from=FOLDER` reads a folder of either
format under any layout.

The folder appears when it is whole; one that is there already is not touched. The exit code is 0, 2 for bad input, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtrain.command_line import Parser, byte_bar, exit_code
from mmtrain.errors import ConfigError

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("output", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--to", required=True, choices=("hf", "hf-stacked", "minimax"), help="format (see above)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file, at most (default %(default)s)")
    parser.add_argument("--tokenizer", help='the run\'s tokenizer.json, a folder with it (and with its chat template), '
                        'or "bytes" (default: found)')  # fmt: skip
    parser.add_argument("--rope-base", type=float, help="RoPE base (default: the one the checkpoint was saved with)")
    parser.add_argument("--plain-rope", action="store_true",
                        help="leave the rows of queries and keys in place where RoPE is partial: for a transformers "
                        "that knows partial RoPE for this model")  # fmt: skip
    parser.add_argument(
        "--no-trial",
        action="store_true",
        help="do not compare a small model's logits with those of the installed transformers",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> str:
    """Check everything, write the folder, and return the line that says where it is and what comes next.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    most = _size(options.shard_size)
    if options.plain_rope and options.to == "minimax":
        raise ConfigError("--plain-rope", "true", "the released code knows partial RoPE anyway", "leave it out")
    if not options.source.exists():
        raise ConfigError("source", options.source, "no such folder", "give a run folder or a checkpoint")
    from mmtrain.hf.export import check_out, export, exported_bytes  # with torch
    from mmtrain.hf.target import DTYPES, TARGETS

    check_out(options.output)
    target = replace(TARGETS[options.to], plain_rope=options.plain_rope)
    model, source, text, longest, origin = _open(options)
    notes = [f"warning: {line}" for line in target.check(model)]
    if text.is_bytes:
        notes.append("note: the byte tokenizer is written as a tokenizer.json with the same ids")
    if text.eos is None:
        notes.append("warning: nothing says which token ends a text: generation_config.json has eos_token_id null")
    if target.reorders(model):
        notes.append(
            f"note: RoPE rotates {model.rotary_dim} of {model.head_dim} dimensions, which transformers may "
            "not know of this model: rows of q_proj and k_proj are reordered so that it computes the same"
        )
    if model.vision is not None and model.vision.contrastive is not None:
        notes.append("note: the maps of the contrastive loss are left out: the format has no place for them")
    if target.port and not options.no_trial:
        notes.append(_trial(model, target, options))
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    dtype = DTYPES[options.dtype]
    total = exported_bytes(model, target, dtype)
    _check_room(options.output, total)
    with byte_bar("writing", total, options.quiet) as told:
        written = export(model, source, target, options.output, dtype, text, longest, most, told)
    files = f"{written.files} file{'s'[: written.files - 1]}"
    size = f"{written.tensors:,} tensors, {written.bytes / 1e9:.2f} GB of {options.dtype} in {files}"
    return f"{origin} -> {options.output}: {size}; next: {_next(options)}"


def _open(options: argparse.Namespace) -> tuple[Any, Any, Any, int | None, Path]:
    """Return model, weights, files of the tokenizer, longest rows trained with, and the folder it all comes from."""
    from mmtrain.checkpoint.progress import read_meta
    from mmtrain.hf.folder import is_hf_folder, open_folder
    from mmtrain.hf.sources import CheckpointWeights, FolderWeights
    from mmtrain.hf.tokenizer_files import TextFiles, files_beside
    from mmtrain.infer.load import open_checkpoint
    from mmtrain.train.stage_warnings import trained_length

    if is_hf_folder(options.source):
        for name in ("tokenizer", "rope_base"):
            if getattr(options, name) is not None:
                problem = f"{options.source} is a Hugging Face folder and brings its own"
                raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), problem, "leave it out")
        folder = open_folder("source", options.source)
        text = TextFiles.of_folder(folder)
        longest = folder.config.get("text_config", folder.config).get("max_position_embeddings")
        return folder.model, FolderWeights(folder), text, longest if type(longest) is int else None, folder.path
    opened = open_checkpoint(options.source, options.tokenizer, options.rope_base)
    meta = read_meta(opened.path)
    text = TextFiles.of_run(opened.tokenizer, files_beside(opened.tokenizer, options.tokenizer, meta))
    return opened.model, CheckpointWeights(opened.path), text, trained_length(meta), opened.path


def _trial(model: Any, target: Any, options: argparse.Namespace) -> str:
    """Compare with the installed transformers; refuse an export that it would compute something else from."""
    from mmtrain.hf.check import try_transformers

    trial = try_transformers(model, target)
    if trial is None:
        return "note: not tried, as transformers is not installed here"
    if trial.agrees:
        return f"note: tried: logits of a small model of this kind equal transformers' to {trial.error:.1e}"
    if trial.error is None:
        return f"warning: the installed transformers cannot read this format: {trial.problem}"
    ways = "leave out --plain-rope, or " if options.plain_rope else ""
    problem = (f"the installed transformers would compute something else: logits of a small model of this kind differ "
               f"by {trial.error:.1e} of their norm")  # fmt: skip
    fix = f"{ways}give --to minimax, another transformers, or --no-trial to write it all the same"
    raise ConfigError("--to", options.to, problem, fix)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|)", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ConfigError("--shard-size", text, "must be a size", "for example 5GB or 500MB")
    return size


def _check_room(out: Path, needed: int) -> None:
    import shutil

    there = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ConfigError("output", out, f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there",
                          "make room, or give another folder")  # fmt: skip


def _next(options: argparse.Namespace) -> str:
    if options.to == "minimax":
        return f"vllm serve {options.output}, or run.init_from={options.output}"
    load = f"AutoModelForCausalLM.from_pretrained({str(options.output)!r})"
    return f"transformers' {load}, or run.init_from={options.output}"


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit code."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing half-written stays
    return exit_code(lambda: print(run(options)), lambda: print("interrupted: nothing was written", file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())

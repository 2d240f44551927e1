#!/usr/bin/env python
r"""Continue a prompt from a checkpoint, token by token as the model chooses them.

    python launch/generate.py runs/first --prompt "def "
    python launch/generate.py runs/first --prompt-file story.txt --greedy
    echo "Once upon a time" | python launch/generate.py runs/first --samples 3

Reads the newest checkpoint of a run folder (or the one named) into one process. Each token is sampled (--temperature
0.8 within --top-p 0.95) or, with --greedy, the likeliest. A continuation stops at the end of its document, or after
--tokens. An empty prompt starts a document; training never scores a document's first token, so that one is arbitrary.

The text goes to standard output; a line with times, and errors, to standard error. The exit code is 0, 2 for bad input,
130 after Ctrl-C, or 141 where standard output was closed, as by `| head`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtrain.command_line import Parser, exit_code
from mmtrain.errors import ConfigError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, one of its checkpoints, or a Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help='text to continue ("-", or none: from standard input)')
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text to continue, without its last newline")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--temperature", type=float, help="below 1 favours likely tokens, 0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest (default: all)")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that reach this sum (default 0.95)")
    parser.add_argument("--samples", type=int, default=1, help="continuations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next counts up (default 0)")
    parser.add_argument("--ignore-eod", action="store_true", help="never end a document: add all --tokens")
    parser.add_argument("--no-echo", action="store_true", help="write the continuation without the prompt")
    parser.add_argument("--quiet", action="store_true", help="no line with times")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the whole checkpoint against its checksums"
    )
    parser.add_argument("--tokenizer", help='the run\'s tokenizer.json, a folder with it, or "bytes" (default: found)')
    parser.add_argument("--rope-base", type=float, help="RoPE base (default: the one the checkpoint was saved with)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked without the checkpoint, read it, and write the continuations.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.infer.device import check_device_name, choose_device
    from mmtrain.infer.prompt import read_prompt
    from mmtrain.infer.request import Request, check_rope_base
    from mmtrain.infer.sampling import Sampling

    sampling = Sampling.from_options(options.greedy, options.temperature, options.top_k, options.top_p)
    counts = (options.tokens, sampling, options.samples, options.seed)
    Request("", *counts).validate()
    check_device_name(options.device)
    if options.rope_base is not None:
        check_rope_base(options.rope_base)
    if not options.checkpoint.exists():
        raise ConfigError("checkpoint", options.checkpoint, "no such folder", "give a run folder or a checkpoint")
    prompt = read_prompt(options.prompt, options.prompt_file, sys.stdin)
    request = Request(prompt, *counts, options.ignore_eod, not options.no_echo)
    if not prompt and not options.quiet:
        print("note: the prompt is empty, so a document is started: its first token is arbitrary", file=sys.stderr)

    device = choose_device(options.device)  # from here on with torch
    from mmtrain.infer.generate import prompt_ids
    from mmtrain.infer.load import load_weights, open_checkpoint
    from mmtrain.infer.write import write_samples

    opened = open_checkpoint(options.checkpoint, options.tokenizer, options.rope_base, not options.no_verify)
    prompt_ids(opened.tokenizer, prompt)  # one that cannot be encoded is refused before the weights are read
    summary = write_samples(load_weights(opened, device), opened.tokenizer, request, sys.stdout)
    if not options.quiet:
        print(f"{opened.path} on {device}: {summary}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Write the continuations; returns the exit code."""
    options = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding does not have
    # After Ctrl-C the shell's prompt gets a line of its own.
    return exit_code(lambda: run(options), lambda: print(flush=True) if sys.stdout.isatty() else None)


if __name__ == "__main__":
    sys.exit(main())

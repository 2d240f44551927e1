#!/usr/bin/env python
r"""Continue a prompt from a checkpoint, token by token as the model chooses them.

    python launch/generate.py runs/first --prompt "def "
    python launch/generate.py runs/first --prompt-file story.txt --greedy
    echo "Once upon a time" | python launch/generate.py runs/first --samples 3
    python launch/generate.py runs/first --prompts prompts.jsonl --out made.jsonl
    python launch/generate.py runs/first --interactive
    python launch/generate.py runs/seeing --image a.png --prompt "How many circles are there?" --chat
    torchrun --nproc-per-node 2 launch/generate.py runs/first --tp 2 --prompt "def "

Reads the newest checkpoint of a run folder (or the one named) into one process, or into the ranks that torchrun started
on a host, which share its weights (--tp, --ep, --etp) or keys (--cp). Each token is sampled (--temperature 0.8 within
--top-p 0.95) or, with --greedy, the likeliest. A continuation stops at the end of its document, or after --tokens. An
empty prompt starts a document; training never scores a document's first token, so that one is arbitrary.

A model with eyes takes --image. --chat writes the prompt as the data of its training write a user's turn.

A file of --prompts has a JSON object a line: prompt (or tokens), images, and where the line differs from the options
id, max_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop, stop_ids, ignore_eod; logprobs,
prompt_logprobs, score_from and keep_prefix too. A line comes out for each, in their order.

The text goes to standard output; a line with times, and errors, to standard error. The exit code is 0, 2 for bad input,
130 after Ctrl-C, or 141 where standard output was closed, as by `| head`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.command_line import Parser, exit_code
from mmtrain.config.telling import told_once
from mmtrain.infer.command import add_engine_options, add_image_options

if TYPE_CHECKING:
    from mmdata.tokenizer import Tokenizer
    from mmtrain.infer.batch import AskedLines
    from mmtrain.infer.engine import Engine
    from mmtrain.infer.prompts_file import PromptLine
    from mmtrain.infer.request import Request
    from mmtrain.vision.prompts import ImagePrompts, SeenPrompt


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, one of its checkpoints, or a Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help='text to continue ("-", or none: from standard input)')
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text to continue, without its last newline")
    prompt.add_argument("--prompts", metavar="FILE", help="JSON lines, one a prompt; all are served together")
    prompt.add_argument("--interactive", action="store_true", help="continue each line of standard input as it comes")
    parser.add_argument("--image", action="append", metavar="FILE", help="for the next <image> of the prompt, "
                        "or in front of it where it has none; may be given again")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="write the prompt as the user's turn; the answer is wanted")
    add_image_options(parser)
    parser.add_argument("--out", metavar="FILE", help="new file for the lines of --prompts (default: standard output)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default %(default)s)")
    _add_sampling(parser)
    parser.add_argument("--samples", type=int, default=1, help="continuations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next counts up (default 0)")
    parser.add_argument("--ignore-eod", action="store_true", help="never end a document: add all --tokens")
    parser.add_argument("--no-echo", action="store_true", help="write the continuation without the prompt")
    parser.add_argument("--quiet", action="store_true", help="no line with times")
    add_engine_options(parser, "prompts of --prompts")
    return parser.parse_args(argv)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--temperature", type=float, help="below 1 favours likely tokens, 0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest (default: all)")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that reach this sum (default 0.95)")
    parser.add_argument("--repetition-penalty", type=float, help="above 1: what came before is less likely (default 1)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends a continuation; may be given again")


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked without the checkpoint, read it, and write the continuations.

    Of several ranks the first one alone reads prompts from standard input, and writes.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.config.process_env import read_processes
    from mmtrain.infer.command import check_options
    from mmtrain.infer.prompt import read_prompt
    from mmtrain.infer.prompts_file import read_prompts

    request = check_options(options)
    lines = [] if options.prompts is None else read_prompts(options.prompts)
    if not (lines or options.interactive) and read_processes().rank == 0:
        request = replace(request, prompt=read_prompt(options.prompt, options.prompt_file, sys.stdin))
        if not request.prompt and not options.quiet:
            print("note: the prompt is empty, so a document is started: its first token is arbitrary", file=sys.stderr)
    summary = serve(options, request, lines)  # from here on with torch
    if summary is not None and not options.quiet:
        print(summary, file=sys.stderr)


def serve(options: argparse.Namespace, request: Request, lines: list[PromptLine]) -> str | None:
    """Read the checkpoint, and write what was asked for; returns a line that sums it up, on the first rank.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.infer.batch import requests_of
    from mmtrain.infer.command import engine_options, image_prompts, open_asked
    from mmtrain.infer.prompt import prompt_ids
    from mmtrain.infer.serving.options import EngineOptions
    from mmtrain.infer.write import options_for

    with open_asked(options) as opened:
        tokenizer = opened.checkpoint.tokenizer
        # What cannot be encoded is refused before the weights are read.
        prompts = image_prompts(options, opened.checkpoint)
        if options.chat and not request.stop:
            request = replace(request, stop=(prompts.answer_end,))
        asked, seen = requests_of(lines, tokenizer, request, prompts, options.chat), None
        if lines:
            sizes = EngineOptions(longest=asked.longest)
        elif options.interactive:
            sizes = EngineOptions(max_running=min(request.samples, 16))
        else:
            if opened.ranks.rank == 0 and (options.image or options.chat or prompts.asks_for_images(request.prompt)):
                seen = prompts.prompt(request.prompt, options.image or [], "--image", turn=options.chat)
            tokens = prompt_ids(tokenizer, request.prompt) if seen is None else seen.tokens
            sizes = options_for(request, len(tokens))
        done = opened.run(
            engine_options(options, sizes),
            lambda engine: write(options, engine, tokenizer, request, asked, seen, prompts),
        )
        return None if done is None else f"{opened.checkpoint.path} on {opened.place}: {done}"


def write(
    options: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, request: Request, asked: AskedLines,
    seen: SeenPrompt | None, prompts: ImagePrompts,
) -> str:  # fmt: skip
    """Write what was asked for; returns a line that sums it up.

    Raises:
        ConfigError: a request does not fit into memory, or the weights give no finite logits.
    """
    from mmtrain.infer.batch import write_batch
    from mmtrain.infer.command import output
    from mmtrain.infer.interactive import converse
    from mmtrain.infer.write import write_request

    if asked.lines:
        with output(options.out) as out:
            return write_batch(engine, asked, out)
    if options.interactive:
        return converse(engine, tokenizer, request, sys.stdin, sys.stdout, prompts)
    return str(write_request(engine, tokenizer, request, sys.stdout, seen))


def main(argv: list[str] | None = None) -> int:
    """Write the continuations; returns the exit code."""
    options = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding does not have
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is told, and the next one waited for
    # After Ctrl-C the shell's prompt gets a line of its own.
    return exit_code(
        lambda: told_once(lambda: run(options)), lambda: print(flush=True) if sys.stdout.isatty() else None
    )


if __name__ == "__main__":
    sys.exit(main())

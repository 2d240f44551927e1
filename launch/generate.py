#!/usr/bin/env python
"""Continue a prompt from a checkpoint: `python launch/generate.py runs/first --prompt "def "`.

Reads the newest checkpoint of a run folder (or the one named) into one process. Greedy by default; --temperature above
0 samples, within --top-k and --top-p when given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that reach this probability")
    parser.add_argument("--samples", type=int, default=1, help="continuations (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument("--tokenizer", help='tokenizer.json, a folder with one, or "bytes" (default: the run\'s)')
    parser.add_argument("--rope-base", type=float, help="RoPE base (default: the one the checkpoint was saved with)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda when there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the continuations; the exit code is 0, or 2 for bad input."""
    options = parse(argv)
    from mmtrain.errors import is_user_error
    from mmtrain.infer import Sampling, continue_prompt, load_for_decoding

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        sampling.validate()
        model, tokenizer = load_for_decoding(options.checkpoint, options.tokenizer, options.device, options.rope_base)
        for sample in range(options.samples):
            text = continue_prompt(
                model, tokenizer, options.prompt, options.tokens, sampling, seed=options.seed + sample
            )
            print(options.prompt + text, flush=True)
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

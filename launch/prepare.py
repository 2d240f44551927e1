"""Turn text into a corpus that launch/pretrain.py trains on.

python launch/prepare.py --input my_texts/ --output corpora/mine
python launch/prepare.py --recipe stdlib --output corpora/stdlib --vocab-size 4096

Reads .txt, .md, source code, JSON (.jsonl, .ndjson, .json: lines, arrays, objects) and .parquet, text and JSON also
packed (.gz, .zst, .bz2, .xz); writes Megatron .bin/.idx files, the tokenizer and a manifest. Large files are
streamed. Killed midway, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "data" / "recipes"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="files and folders of text")
    what.add_argument("--recipe", help="a corpus recipe in data/recipes, for example stdlib")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the corpus folder to make")
    parser.add_argument("--tokenizer", default="train", help='"train" (default), "bytes", or a tokenizer.json')
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the BPE to train (default %(default)s)")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.01, help="share of tokens held out (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--text-field", default="text", metavar="NAME",
                        help="JSON key or Parquet column; a.b leads into objects (default %(default)s)")  # fmt: skip
    parser.add_argument("--separator", metavar="TEXT",
                        help=r"what stands between the documents of a text file, with \n, \t, \x1e as escapes: "
                        r"'<|endoftext|>', or '\n\n' for blank lines; line ends beside it are dropped")  # fmt: skip
    parser.add_argument("--suffix", nargs="+", default=[], help="take only these from folders, for example .py .md")
    parser.add_argument("--force", action="store_true", help="replace what the output folder holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for bad input, 130 for Ctrl-C."""
    args = parse(argv)
    # After the command line is known to be one: --help answers at once.
    from mmdata.errors import DataError
    from mmdata.prepare.pipeline import PrepareOptions, prepare
    from mmdata.prepare.recipes import recipe_files
    from mmdata.prepare.summary import summary

    try:
        options = PrepareOptions(
            inputs=args.input or recipe_files(args.recipe, RECIPES),
            output=args.output,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            valid_fraction=args.valid_fraction,
            workers=args.workers,
            text_field=args.text_field,
            separator=args.separator,
            suffixes=args.suffix,
            recipe=args.recipe,
            force=args.force,
        )
        result = prepare(options, log=lambda line: print(line, file=sys.stderr))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    if result.reused:
        print("already done: this very corpus is there, nothing to do", file=sys.stderr)
    print(summary(result.manifest, args.output, _pretrain()))
    return 0


def _pretrain() -> str:
    """How torchrun is told to train: by the path of the script, or by the module where that was called."""
    if sys.argv[0].startswith("mmtrain "):
        return "-m mmtrain pretrain"
    script = Path(__file__).resolve().with_name("pretrain.py")
    return shlex.quote(str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script))


if __name__ == "__main__":
    sys.exit(main())

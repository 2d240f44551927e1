#!/usr/bin/env python
"""Ask a run with eyes about images: `python launch/ask_images.py RUN --questions FILE.jsonl`.

Prints the share of right answers by kind beside what the commonest answer would get, and writes a page of pictures
with the answers. The file has a record a line: question, answer, image, and maybe kind. Of --pairs (prompt, chosen,
rejected, images, and maybe kind) it prints how often the chosen answer is the more probable one.

Of a run with a contrastive loss --captions FILE.jsonl (image, caption, and maybe choices and kind) prints how many
images are nearest to their own caption, among the choices or all captions of the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("--questions", type=Path, metavar="FILE", help=".jsonl, images beside it")
    parser.add_argument("--captions", type=Path, metavar="FILE", help=".jsonl of images that are to find theirs")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help=".jsonl of answers, one preferred to the other")
    parser.add_argument("--before", type=Path, metavar="RUN", help="an earlier run, whose figures stand beside")
    parser.add_argument("--limit", type=int, metavar="N", help="ask so many, spread over the file (default: all)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write (default: RUN/answers.html)")
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="pictures on it (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for bad input."""
    args = parse(argv)
    # After the command line is known to be one: --help answers at once.
    from mmdata.errors import DataError
    from mmtrain.errors import ConfigError
    from mmtrain.infer.load import load_for_decoding
    from mmtrain.output import say
    from mmtrain.runs.ask.ask import AskRequest, ask, check_counts, told
    from mmtrain.runs.ask.captions import caption_lines

    try:
        check_counts(args.limit, args.pictures)
        if args.questions is None:
            needless = [name for name in ("pairs", "before", "page") if getattr(args, name) is not None]
            if args.captions is None or needless:
                option = f"--{needless[0]}" if needless else "--questions"
                raise ConfigError(option, getattr(args, option[2:]), "there are no questions to ask",
                                  "give --questions FILE, or --captions FILE alone")  # fmt: skip
        model, tokenizer = load_for_decoding(args.run, device=args.device)
        if args.captions is not None:
            for one in caption_lines(model, tokenizer, args.run.name, args.captions, args.limit):
                say(told(one, "find their caption"))
        if args.questions is None:
            return 0
        page = args.page or args.run / "answers.html"
        before = None if args.before is None else load_for_decoding(args.before, device=args.device)[0]
        request = AskRequest(args.run.name, args.questions, page, args.pairs, args.limit, args.pictures)
        for line in ask(model, tokenizer, request, before):
            say(line)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

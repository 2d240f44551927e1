"""Turn records with images into a corpus that launch/pretrain.py trains on.

python launch/prepare_images.py --input llava.jsonl --output corpora/vl --tokenizer tokenizer.json
python launch/prepare_images.py --input shards/ --output corpora/align --tokenizer tokenizer.json --grids fixed

Reads .jsonl and .json (LLaVA's conversations, captions, questions, interleaved parts, preference pairs), with images
beside them, and WebDataset shards (.tar). The images stay where they are: of each its size is read, and with it the
number of its tokens is known. Killed midway, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files and folders")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the corpus folder to make")
    parser.add_argument("--tokenizer", required=True, help='a tokenizer.json, a folder with one, or "train"')
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the BPE to train (default %(default)s)")
    parser.add_argument(
        "--image-token",
        default="<image>",
        metavar="NAME|ID",
        help="special token that stands for images (default %(default)s; 200025 in the release)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that paths of images start from (default: that of the record's file)",
    )
    parser.add_argument("--tile", type=int, default=336, help="pixels of a tile's side (default %(default)s)")
    parser.add_argument("--patch", type=int, default=14, help="pixels of a patch's side (default %(default)s)")
    parser.add_argument(
        "--grids",
        default="released",
        metavar="LIST",
        help='"released" (28 grids, default), "fixed" (one tile), or rows x columns: 1x1,1x2,2x1,2x2',
    )
    parser.add_argument("--class-token", action="store_true", help="count a class token for each thumbnail")
    parser.add_argument(
        "--caption-tokens",
        type=int,
        metavar="N",
        help="cut captions at N tokens (default: never; 76 for MiniMax-VL-01's vision transformer)",
    )
    parser.add_argument("--user", default="User: {}\\n", metavar="TEXT", help="a user's turn (default %(default)s)")
    parser.add_argument(
        "--assistant", default="Assistant: {}\\n", metavar="TEXT", help="an assistant's turn (default %(default)s)"
    )
    parser.add_argument("--system", default="{}\\n", metavar="TEXT", help="a system turn (default %(default)s)")
    parser.add_argument(
        "--placeholder",
        default="<image>",
        metavar="TEXT",
        help="what stands for an image in texts (default %(default)s)",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.01, help="share of tokens held out (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--check-pixels", action="store_true", help="decode every image, to leave out broken ones")
    parser.add_argument("--strict", action="store_true", help="refuse records that cannot be used")
    parser.add_argument("--force", action="store_true", help="replace what the output folder holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for bad input, 130 for Ctrl-C."""
    args = parse(argv)
    # After the command line is known to be one: --help answers at once.
    from mmdata.errors import DataError
    from mmdata.images.grid import TileRules
    from mmdata.prepare.text_files import unescaped
    from mmdata.prepare_images.grids import parse_grids
    from mmdata.prepare_images.pipeline import ImageOptions, prepare_images
    from mmdata.prepare_images.summary import image_summary
    from mmdata.prepare_images.template import Template

    try:
        template = Template(*map(unescaped, (args.user, args.assistant, args.system, args.placeholder)))
        options = ImageOptions(
            inputs=args.input, output=args.output, tokenizer=args.tokenizer, vocab_size=args.vocab_size,
            image_token=args.image_token, images=args.images, template=template,
            rules=TileRules(args.tile, args.patch, parse_grids(args.grids), args.class_token),
            valid_fraction=args.valid_fraction, workers=args.workers, check_pixels=args.check_pixels,
            strict=args.strict, force=args.force, caption_tokens=args.caption_tokens,
        )  # fmt: skip
        result = prepare_images(options, log=lambda line: print(line, file=sys.stderr))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    if result.reused:
        print("already done: this very corpus is there, nothing to do", file=sys.stderr)
    print(image_summary(result.manifest, shlex.quote(str(args.output))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

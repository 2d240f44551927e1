"""Draw a data set of pictures with captions, questions and preference pairs.

python -m mmdata.draw --output drawn --images 4000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmdata.draw.write import DrawOptions, draw
from mmdata.errors import DataError


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for bad input."""
    parser = argparse.ArgumentParser("python -m mmdata.draw", description="Draw pictures with captions and questions.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--images", type=int, default=4000, help="pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another draws others (default %(default)s)")
    parser.add_argument("--tile", type=int, default=56, help="pictures have 1 to 2 of it a side (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="one thing in N is held out (default 8)")
    parser.add_argument("--tar", action="store_true", help="write captions as WebDataset shards too")
    args = parser.parse_args(argv)
    try:
        counts = draw(DrawOptions(args.output, args.images, args.seed, args.tile, args.held_out, args.tar))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    print(f"{args.images:,} pictures in {args.output}: records in {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

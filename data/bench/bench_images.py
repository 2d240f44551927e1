"""Images and tiles a second out of decoding, by size, format and number of threads.

    python data/bench/bench_images.py [--threads 1 2] [--seconds 2] [--out FILE]

Images are smooth pictures with noise, as photographs are, written as JPEG (quality 90) and PNG to a temporary folder,
and decoded into the released grids of 336-pixel tiles by `mmdata.images.reader.read_tiles`. A JSON line each.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from mmdata.images.grid import TileRules, lay_image
from mmdata.images.reader import read_tiles
from mmdata.images.row import RowImage

SIZES = [(336, 336), (640, 480), (1024, 768), (2016, 1008), (4000, 3000)]
RULES = {"released": TileRules(), "fixed": TileRules(grids=())}


def picture(folder: Path, size: tuple[int, int], kind: str) -> RowImage:
    """A file of one picture."""
    width, height = size
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 220, width), np.linspace(0, 220, height))
    pixels = np.stack([x, y, 220 - x], -1) + rng.normal(0, 6, (height, width, 1))
    path = folder / f"{width}x{height}.{kind}"
    options = {"quality": 90} if kind == "jpeg" else {"compress_level": 6}
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, **options)
    return RowImage(str(path), 0, path.stat().st_size, width, height, 0, 0)


def measure(image: RowImage, kind: str, grids: str, threads: int, seconds: float) -> dict[str, object]:
    """Decode one picture again and again."""
    rules = RULES[grids]
    read_tiles(image, rules)
    stop = time.perf_counter() + seconds

    def work(thread: int) -> int:
        done = 0
        while time.perf_counter() < stop:
            read_tiles(image, rules)
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        done = sum(pool.map(work, range(threads)))
        rate = done / (time.perf_counter() - start)
    tiles = lay_image(image.width, image.height, rules).tiles
    return {
        "case": f"{image.width} x {image.height} {kind}", "grids": grids, "threads": threads,
        "kilobytes": image.size >> 10,
        "images_per_second": round(rate, 1), "tiles": tiles, "tiles_per_second": round(rate * tiles, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case")
    parser.add_argument("--out", type=Path, help="write all lines to a JSON file too")
    args = parser.parse_args()
    head = {"bench": "images", "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "pillow": PIL.__version__, "machine": platform.machine()}  # fmt: skip
    lines: list[dict[str, object]] = [head]
    print(json.dumps(head))
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for kind in ("jpeg", "png"):
                image = picture(Path(folder), size, kind)
                for grids in RULES:
                    for threads in args.threads:
                        lines.append(measure(image, kind, grids, threads, args.seconds))
                        print(json.dumps(lines[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

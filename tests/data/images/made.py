"""Images and small corpora with images that the tests make themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdata.images.corpus import ImageCorpus
from mmdata.images.grid import TileRules
from mmdata.prepare_images.pipeline import ImageOptions, prepare_images

SMALL = TileRules(tile=16, patch=8, grids=((1, 1), (1, 2), (2, 1), (2, 2)))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture whose corners differ."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 250 - x], -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Bytes of a picture in a format."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(turn: int) -> Image.Exif:
    """EXIF data that ask for a turn."""
    found = Image.Exif()
    found[0x0112] = turn
    return found


def write_records(folder: Path, records: Sequence[dict[str, Any]], name: str = "records.jsonl") -> Path:
    """Records as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_images(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Pictures `0.png`, `1.png`, ... of these sizes (width, height); their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        (folder / f"{i}.png").write_bytes(encoded(picture(width, height)))
    return [f"{i}.png" for i in range(len(sizes))]


def prepared(records: Path, output: Path, **options: Any) -> ImageCorpus:
    """Corpus of all records, with a tokenizer trained on them."""
    given = {"tokenizer": "train", "vocab_size": 300, "rules": SMALL, "valid_fraction": 0.0, "workers": 1} | options
    prepare_images(ImageOptions(inputs=[records], output=output, **given))
    return ImageCorpus(output / "train")

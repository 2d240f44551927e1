"""Files of the drawn data set: images, and records in the shapes that `mmdata.prepare_images` reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mmdata.draw.scene import Draws, Scene, pixels_of, scene_of
from mmdata.errors import DataError
from mmdata.images.place import need_pillow

SPLITS = ("train", "valid")
KINDS = ("captions", "questions", "conversations", "pairs", "interleaved")


@dataclass(frozen=True)
class DrawOptions:
    """A request.

    Attributes:
        output: folder to make; it must not be there, or be empty.
        images: pictures, of both splits together.
        seed: another gives other pictures, and holds out others.
        tile: pixels; pictures are of one to two tiles a side.
        held_out: one in so many of the things that pictures show is in the held-out split only.
        tar: captions are WebDataset shards besides.
    """

    output: Path
    images: int = 4000
    seed: int = 0
    tile: int = 56
    held_out: int = 8
    tar: bool = False


def draw(options: DrawOptions) -> dict[str, int]:
    """Write the data set; the number of records of each file.

    `SPLIT_captions.jsonl` (caption), `SPLIT_questions.jsonl` (question, answer, kind), `SPLIT_conversations.jsonl` (all
    questions of a picture, as LLaVA writes them), `SPLIT_pairs.jsonl` (preference pairs), `SPLIT_interleaved.jsonl`
    (two pictures in a text), and `images/`.

    Raises:
        DataError: an option out of range, Pillow is missing, or the folder is not empty.
    """
    need_pillow()
    if options.images < 1 or options.held_out < 2:
        raise DataError(f"--images is {options.images}, --held-out {options.held_out}: at least 1, and at least 2")
    if options.tile < 28:
        raise DataError(f"--tile is {options.tile}: words of four letters need 28 pixels")
    if options.output.exists() and any(options.output.iterdir()):
        raise DataError(f"--output {options.output} is not empty: choose another folder")
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        files = {
            (split, kind): stack.enter_context(open(options.output / f"{split}_{kind}.jsonl", "w", encoding="utf-8"))
            for split in SPLITS
            for kind in KINDS
        }
        tars = {
            split: stack.enter_context(tarfile.open(options.output / f"{split}_captions.tar", "w"))
            for split in (SPLITS if options.tar else ())
        }
        before: dict[str, tuple[str, Scene]] = {}
        for name, scene in scenes(options):
            split = SPLITS[int(scene.is_held_out(options.seed, options.held_out))]
            png = _png(scene)
            (options.output / name).write_bytes(png)
            for kind, records in _records(name, scene, before.get(split)).items():
                _write(files[split, kind], records)
                key = f"{split}_{kind}"
                counts[key] = counts.get(key, 0) + len(records)
            if split in tars:
                _add(tars[split], Path(name).stem, png, scene.caption())
            before[split] = (name, scene)
    return counts


def scenes(options: DrawOptions) -> Iterator[tuple[str, Scene]]:
    """Name of the file, from the output folder, and scene of each picture."""
    tile = options.tile
    sizes = [(tile, tile), (2 * tile, tile), (tile, 2 * tile), (2 * tile, 2 * tile), (tile * 3 // 2, tile)]
    for number in range(options.images):
        yield f"images/{number:06d}.png", scene_of(options.seed, number, sizes)


def _records(name: str, scene: Scene, before: tuple[str, Scene] | None) -> dict[str, list[dict[str, Any]]]:
    """Records of a picture by the kind of their file; `before` is the picture before it in its split."""
    questions = scene.questions()
    first = Draws(scene.jitter, 2).below(len(questions))  # a model must not know what is asked by its place
    turns: list[dict[str, str]] = []
    for i, one in enumerate([*questions[first:], *questions[:first]]):
        turns.append({"from": "human", "value": f"<image>\n{one.question}" if i == 0 else one.question})
        turns.append({"from": "gpt", "value": one.answer})
    one = scene.preference()
    pair = {"images": [name], "prompt": f"<image>\n{one.question}", "chosen": one.answer, "rejected": one.wrong}
    pair["kind"] = one.kind
    asked = [{"image": name, "question": q.question, "answer": q.answer, "kind": q.kind} for q in questions]
    found: dict[str, list[dict[str, Any]]] = {
        "captions": [{"image": name, "caption": scene.caption()}],
        "questions": asked,
        "conversations": [{"id": Path(name).stem, "image": name, "conversations": turns}],
        "pairs": [pair],
        "interleaved": [],
    }
    if before is not None:
        text = f"First: <image> {before[1].caption()} Second: <image> {scene.caption()}"
        found["interleaved"] = [{"images": [before[0], name], "text": text}]
    return found


def _png(scene: Scene) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels_of(scene)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _write(stream: TextIO, records: list[dict[str, Any]]) -> None:
    for record in records:
        stream.write(json.dumps(record) + "\n")


def _add(archive: tarfile.TarFile, key: str, png: bytes, caption: str) -> None:
    for suffix, data in (("png", png), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

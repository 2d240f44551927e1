"""The pipeline behind launch/prepare_images.py: records with images in, a corpus folder out, resumable at any point.

It works as that of text does (`mmdata.prepare.pipeline`): in `OUTPUT/.partial`, shard by shard, and only whole, synced
files are renamed to their final names, the manifest last of all. The images stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdata.corpus.manifest import FORMAT, NAME, Manifest, sha256_file
from mmdata.corpus.split import check_fraction, held_out_warning
from mmdata.corpus.writer import fsync, token_dtype
from mmdata.errors import DataError
from mmdata.images.corpus import facts_of
from mmdata.images.grid import TileRules
from mmdata.images.place import need_pillow
from mmdata.images.table import SHARED, side_names
from mmdata.prepare.collect import Source, plan_shards
from mmdata.prepare.pool import cores, run_shards
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece
from mmdata.prepare.workfolder import Prepared, make_corpus
from mmdata.prepare_images.collect import collect_records
from mmdata.prepare_images.image_token import image_token_id
from mmdata.prepare_images.merge import Merged, merge_image_shards
from mmdata.prepare_images.record_tokenizer import make_tokenizer
from mmdata.prepare_images.shard import ImageShardTask, make_image_shard
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import load_tokenizer

_RULES = 1  # of making documents of records: a corpus made by other rules is not the one asked for


@dataclass(frozen=True)
class ImageOptions:
    """A request: the records, the folder, the tokenizer, the tiles and the split.

    Attributes:
        inputs: files of records, and folders of them.
        output: the corpus folder.
        tokenizer: the path of a tokenizer.json or of a folder that holds one, or "train".
        vocab_size: of the tokenizer to be trained.
        image_token: name or id of the token that stands for images.
        images: folder that relative paths of images are taken from; None is that of each file of records.
        rules: how images become tiles.
        template: of conversations.
        valid_fraction: share of tokens held out, in [0, 1); documents that begin with one image stay together.
        workers: processes; None is one for each core that this process may use. Never changes the result.
        check_pixels: decode every image, so that broken ones are left out now.
        strict: refuse, instead of leaving out, a record that cannot be used.
        force: replace what `output` holds.
        caption_tokens: most tokens of the text of records that are a caption; longer ones are cut. None cuts none.
    """

    inputs: Sequence[Path]
    output: Path
    tokenizer: str
    vocab_size: int = 32768
    image_token: str = "<image>"
    images: Path | None = None
    rules: TileRules = field(default_factory=TileRules)
    template: Template = field(default_factory=Template)
    valid_fraction: float = 0.01
    workers: int | None = None
    check_pixels: bool = False
    strict: bool = False
    force: bool = False
    caption_tokens: int | None = None


def prepare_images(options: ImageOptions, log: Callable[[str], None] = lambda line: None) -> Prepared:
    """Make the corpus folder that `options` ask for, going on from an interrupted run of the same request.

    Raises:
        DataError: bad options or inputs, no document at all, a record that cannot be used (`strict`), or an output
            folder that holds something else.
    """
    _check(options)
    output = Path(options.output)
    sources, skips = collect_records(options.inputs, exclude=output)
    if not sources:
        passed = SkipLog(skips).reasons() or "it holds no file"
        raise DataError(f"the corpus is empty: no .jsonl, .json or .tar file to read in --input ({passed})")
    request = _fingerprint(options, sources)
    return make_corpus(
        output, request, options.force, lambda partial: _build(options, request, sources, skips, partial, log)
    )


def _check(options: ImageOptions) -> None:
    """Refuse options before anything is read or written."""
    need_pillow()
    check_fraction(options.valid_fraction)
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers is {options.workers}: it must be at least 1; leave it out for one a core")
    if options.caption_tokens is not None and options.caption_tokens < 1:
        raise DataError(f"--caption-tokens is {options.caption_tokens}: it must be at least 1, or left out")
    if options.images is not None and not options.images.is_dir():
        raise DataError(f"--images {options.images} is not a folder: give the one that paths of images start from")
    if options.tokenizer == "bytes":
        raise DataError("--tokenizer bytes has no token for images: give a tokenizer.json that has, or train one")
    if options.tokenizer == "train":
        if options.image_token.isdecimal():
            raise DataError(
                f"--image-token {options.image_token}: a tokenizer that is trained here gets a token by name, "
                "for example <image>"
            )
    else:
        image_token_id(load_tokenizer(options.tokenizer), options.image_token)


def _build(
    options: ImageOptions,
    request: str,
    sources: Sequence[Source],
    skips: list[Skip],
    partial: Path,
    log: Callable[[str], None],
) -> Manifest:
    """Make tokenizer, shards and merged files, all ready to be renamed; return their manifest."""
    planned = _plan(sources)
    tokenizer, facts = make_tokenizer(
        options.tokenizer, options.vocab_size, options.image_token, options.template, planned, partial
    )
    dtype, image_id = token_dtype(tokenizer.vocab_size), image_token_id(tokenizer, options.image_token)
    folder = partial / "shards"
    folder.mkdir(exist_ok=True)
    images = None if options.images is None else os.path.abspath(options.images)
    tasks = [
        ImageShardTask(
            i, tuple(pieces), str(folder), str(partial / "tokenizer.json"), facts["sha256"], dtype.name, image_id,
            images, options.template, options.rules, options.check_pixels, options.caption_tokens,
        )
        for i, pieces in enumerate(planned)
    ]  # fmt: skip
    run_shards(tasks, options.workers or cores(), log, make_image_shard)
    merged = merge_image_shards(tasks, partial, Path(options.output), dtype, options.valid_fraction)
    if options.strict and merged.skips:
        raise DataError(f"--strict: records of --input cannot be used: {_first_of_each(merged.skips)}")
    skipped = SkipLog(skips)
    skipped.merge(merged.skips)
    manifest = Manifest(
        request=request,
        tokenizer=facts,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=dtype.name,
        splits=merged.splits,
        inputs=_inputs(options, sources),
        skipped=skipped.facts(),
        images=_image_facts(options, image_id, merged),
    )
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    warning = held_out_warning(tokens.get("valid", 0), sum(tokens.values()))
    if options.valid_fraction and warning:
        log(f"warning: {warning}; hold out more with --valid-fraction")
    manifest.write(partial / NAME)
    for name in (*SHARED, *(name for split in manifest.splits for name in side_names(split)), NAME):
        fsync(partial / name)
    return manifest


def _plan(sources: Sequence[Source]) -> list[list[Piece]]:
    """Pieces of all files, in shards: JSON as text's pipeline plans it, a tar shard a shard of its own."""
    planned = plan_shards([source for source in sources if source.kind != "tar"])
    tars = [[Piece(source.path, "tar", weight=source.size)] for source in sources if source.kind == "tar"]
    return planned + tars


def _fingerprint(options: ImageOptions, sources: Sequence[Source]) -> str:
    """SHA-256 over everything that decides the result, but the images: they are looked at when a shard is made."""
    if options.tokenizer == "train":
        tokenizer = f"train {options.vocab_size}"
    else:
        given = Path(options.tokenizer)
        tokenizer = sha256_file(given / "tokenizer.json" if given.is_dir() else given)
    images = None if options.images is None else os.path.abspath(options.images)
    facts = [FORMAT, _RULES, tokenizer, options.image_token, images, facts_of(options.rules), asdict(options.template),
             options.valid_fraction, options.check_pixels]  # fmt: skip
    if options.caption_tokens is not None:  # corpora of before there was the option stay what was asked for
        facts.append(f"captions of {options.caption_tokens}")
    return hashlib.sha256(json.dumps([facts, [asdict(source) for source in sources]]).encode()).hexdigest()


def _inputs(options: ImageOptions, sources: Sequence[Source]) -> dict[str, Any]:
    return {
        "paths": [str(path) for path in options.inputs],
        "files": len(sources),
        "bytes": sum(source.size for source in sources),
        "valid_fraction": options.valid_fraction,
    }


def _image_facts(options: ImageOptions, image_id: int, merged: Merged) -> dict[str, Any]:
    given = {"token": image_id, **facts_of(options.rules), "template": asdict(options.template)}
    if options.caption_tokens is not None:
        given["caption_tokens"] = options.caption_tokens
    return given | {"pixels_checked": options.check_pixels} | merged.images


def _first_of_each(skips: SkipLog) -> str:
    return "; ".join(f"{reason} {entry['count']} ({entry['names'][0]})" for reason, entry in skips.facts().items())

"""What a step's metrics say of images, and the operations of the eyes in its model FLOPs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdata.images.header import REASONS, BadImage
from mmdata.images.stream import ImageStream
from mmdata.images.stream_batches import image_batches
from mmtrain.config.cli import compose
from mmtrain.train.image_counts import NAMES, count_batches, image_counts, image_flops, image_record
from mmtrain.train.image_rows import image_inputs
from mmtrain.vision.flops import encoder_flops
from mmtrain.vision.images import token_sources
from tests.data.images.made import prepared, write_images, write_records

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Two batches, one image of which is gone since it was prepared."""
    folder = tmp_path_factory.mktemp("counts")
    names = write_images(folder / "images", [(16, 30), (40, 30), (16, 16), (64, 64)])
    records = write_records(folder, [{"image": f"images/{name}", "caption": "seen"} for name in names])
    corpus = prepared(records, folder / "c")
    (folder / "images/2.png").unlink()
    stream = ImageStream(corpus, seq_len=64, seed=0, eod_id=0)
    return list(image_batches(stream, [[i] for i in range(stream.rows_per_epoch())]))


def test_counts_are_those_of_the_tiles_and_tokens_that_are_made(batches: list) -> None:
    counts = image_counts(count_batches(batches))
    layouts = [image.layout for batch in batches for image in batch.images]
    sources = token_sources(layouts)
    assert counts["images"] == len(layouts) == 4
    assert counts["tiles"] == sum(len(batch.tiles_TCHW) for batch in batches)
    assert (counts["image_tokens"], counts["image_patches"]) == (sources.tokens, len(sources.patch_M))
    assert counts["images_failed/missing"] == 1 == sum(counts[f"images_failed/{reason}"] for reason in REASONS)


def test_only_reasons_that_were_met_are_written(batches: list) -> None:
    counts = image_counts(count_batches(batches))
    record = image_record(counts)
    assert list(record) == ["images", "tiles", "image_tokens", "images_failed", "images_failed/missing"]
    assert image_record(image_counts([0] * len(NAMES)))["images_failed"] == 0
    assert image_record(image_counts([])) == {}


def test_a_reason_that_is_not_known_is_counted_as_other(batches: list) -> None:
    images = tuple(replace(image, failed=BadImage("eaten by moths").reason) for image in batches[0].images)
    counts = image_counts(count_batches([replace(batches[0], images=images)]))
    assert counts["images_failed/other"] == len(images)


def test_eyes_count_three_times_their_forward_pass(batches: list) -> None:
    model = compose(["model=tiny_vl", "data.path=x", "run.name=y", "stage=quickstart"], CONFIGS).model
    counts = image_counts(count_batches(batches))
    assert image_flops(model, counts) == 3 * encoder_flops(model, counts["tiles"], counts["image_patches"]) > 0
    assert image_flops(replace(model, vision=None), counts) == image_flops(model, {}) == 0.0


def test_images_are_laid_out_by_the_rules_of_their_corpus(batches: list) -> None:
    """A model with other grids takes the layouts that the corpus' tokens were counted by."""
    vision = compose(["model=tiny_vl", "data.path=x", "run.name=y", "stage=quickstart"], CONFIGS).model.vision
    assert vision is not None
    for batch in batches:
        given = image_inputs(batch, replace(vision, tile_size=16, patch_size=8, grids=[]))
        assert given.images.layouts == tuple(image.layout for image in batch.images)
        assert len(given.at_J) == sum(layout.tokens for layout in given.images.layouts)
        assert torch.equal(batch.tokens_BS.flatten()[given.at_J], torch.ones(len(given.at_J), dtype=torch.int64))

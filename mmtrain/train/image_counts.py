"""What a step shows of images, counted over all ranks: images, tiles, tokens, and images that failed, by reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mmdata.images.batch import ImageBatch, count_images
from mmdata.images.header import REASONS
from mmdata.rows.loader import PackedBatch
from mmtrain.config import ModelConfig
from mmtrain.vision.flops import encoder_flops

FAILED = "images_failed/"
"""What the name of a reason begins with in metrics; `images_failed` is all of them."""

OTHER = "other"
NAMES = ("images", "tiles", "image_tokens", "image_patches", *(f"{FAILED}{reason}" for reason in (*REASONS, OTHER)))


def count_batches(batches: Iterable[PackedBatch]) -> list[int]:
    """Return the counts of this rank's batches of a step, in the order of NAMES: the same on all layouts.

    ``image_patches`` are those of ``image_tokens`` that are projected; the rest are newlines.
    """
    batches = list(batches)
    counts = dict.fromkeys(NAMES, 0)
    for name, count in count_images(batches).items():
        counts[name if name in counts else f"{FAILED}{OTHER}"] += count
    for batch in batches:
        for image in batch.images if isinstance(batch, ImageBatch) else ():
            counts["image_tokens"] += image.tokens
            counts["image_patches"] += image.tokens - image.layout.newlines
    return list(counts.values())


def image_counts(values: Sequence[float]) -> dict[str, int]:
    """Return counts by name, given them in the order of NAMES; nothing where there are none."""
    return {name: int(value) for name, value in zip(NAMES, values, strict=True)} if len(values) else {}


def image_flops(model: ModelConfig, counts: Mapping[str, int]) -> float:
    """Return the useful operations of the eyes in a step, forward and backward; parts that are frozen count too.

    As of the text model (`mmtrain.model.flops.step_flops`), backward counts twice what forward does.
    """
    if not counts or model.vision is None:
        return 0.0
    return 3 * encoder_flops(model, counts["tiles"], counts["image_patches"])


def image_record(counts: Mapping[str, int]) -> dict[str, int]:
    """Return what metrics say of a step's images: counts, and each reason for which some failed."""
    if not counts:
        return {}
    failed = {name: count for name, count in counts.items() if name.startswith(FAILED) and count}
    whole = {name: counts[name] for name in ("images", "tiles", "image_tokens")}
    return {**whole, "images_failed": sum(failed.values()), **failed}

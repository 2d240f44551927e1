"""Check that a model sees the images of its corpora, as tiles that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmdata.corpus.split import Split
from mmdata.images.corpus import ImageCorpus
from mmdata.images.grid import Grid, TileRules
from mmdata.images.place import need_pillow
from mmtrain.config import ModelConfig, SourceConfig
from mmtrain.errors import ConfigError
from mmtrain.vision.images import tile_rules


def check_images(
    sources: Sequence[tuple[str, SourceConfig]], splits: Mapping[str, tuple[Split, Split | None]], model: ModelConfig
) -> list[str]:
    """Refuse corpora whose images the model cannot see; return a line where it has eyes and nothing to see.

    The grids of a corpus are the model's, or none of them: images at a fixed resolution, one tile each, which is one
    more way of laying an image out. What says how large tiles and patches are must be the same.

    Args:
        sources: as `mmtrain.train.source_tokenizers.named_sources` returns them.
        splits: training and held-out documents of each corpus, by path.
        model: of the run.

    Raises:
        ConfigError: naming the corpus, both values, and how to make them one.
        DataError: Pillow is missing.
    """
    found = [(option, source.path, splits[source.path][0].corpus) for option, source in sources]
    seen = [
        (option, path, corpus)
        for option, path, corpus in found
        if isinstance(corpus, ImageCorpus) and len(corpus.places)
    ]
    if model.vision is None:
        for option, path, _ in seen:
            raise ConfigError(option, path, f"holds images, and model={model.name} has no eyes",
                              "give a model that sees, for example model=vl_3b, or a corpus of text")  # fmt: skip
        return []
    if not seen:
        return [f"warning: model={model.name} has eyes, and no corpus has images: they learn nothing; give one that "
                "launch/prepare_images.py made"]  # fmt: skip
    need_pillow()
    for option, path, corpus in seen:
        _check_rules(f"{option}={path}", corpus.rules, tile_rules(model.vision))
        if corpus.image_id != model.vision.image_token:
            raise ConfigError("model.vision.image_token", model.vision.image_token,
                              f"{option}={path} was prepared with token {corpus.image_id} for images",
                              f"give model.vision.image_token={corpus.image_id}")  # fmt: skip
    return []


def _check_rules(corpus: str, there: TileRules, here: TileRules) -> None:
    """Refuse rules by which images would not become the tiles or the tokens that the model makes of them."""
    pairs = (
        ("tile_size", "tile", here.tile, there.tile),
        ("patch_size", "patch", here.patch, there.patch),
        ("keep_class_token", "class-token", here.class_token, there.class_token),
    )
    for option, flag, own, given in pairs:
        if own != given:
            raise ConfigError(f"model.vision.{option}", own, f"{corpus} was prepared with --{flag} {given}",
                              f"give model.vision.{option}={str(given).lower()}, or prepare it again")  # fmt: skip
    if there.grids and there.grids != here.grids:
        own = _told(here.grids) if here.grids else "fixed"
        raise ConfigError("model.vision.grids", own, f"{corpus} was prepared with --grids {_told(there.grids)}",
                          f"prepare it again with --grids {own} (fixed, one tile an image, goes with any), or give "
                          f"model.vision.grids={_listed(there.grids)}")  # fmt: skip


def _told(grids: Sequence[Grid]) -> str:
    return ",".join(f"{rows}x{columns}" for rows, columns in grids)


def _listed(grids: Sequence[Grid]) -> str:
    return "[" + ",".join(f"[{rows},{columns}]" for rows, columns in grids) + "]"

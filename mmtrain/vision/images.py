"""Images of a micro-batch, and where each of their tokens comes from: a patch of a tile, or the newline.

Legend: N tiles, S pixels of a tile's side, Q tokens that the vision transformer has of a tile, I tokens of all images,
M tokens of images that are patches (or class tokens); I - M are newlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdata.images.grid import ImageLayout, TileRules
from mmdata.images.tiles import MEAN, STD
from mmtrain.config import VisionConfig
from mmtrain.errors import ConfigError


@dataclass(frozen=True)
class Images:
    """Images of a micro-batch, in the order in which its rows name them.

    Attributes:
        tiles_N3SS: uint8, tiles of all images, as `mmdata.images.tiles.cut_tiles` makes them: of each image the
            thumbnail, then the grid, row by row.
        layouts: one an image.
    """

    tiles_N3SS: Tensor
    layouts: tuple[ImageLayout, ...]

    def check(self, config: VisionConfig) -> None:
        """Refuse tiles that are not those of the layouts, and layouts or tiles that are not of the configuration.

        Raises:
            ConfigError: naming both counts or sizes.
        """
        wanted, size = sum(layout.tiles for layout in self.layouts), config.tile_size
        dtype, shape = self.tiles_N3SS.dtype, list(self.tiles_N3SS.shape[1:])
        if dtype != torch.uint8 or shape != [3, size, size]:
            raise ConfigError("model.vision.tile_size", size, f"tiles are {dtype} of {shape}",
                              f"cut images into torch.uint8 of [3, {size}, {size}]")  # fmt: skip
        rules = tile_rules(config)
        for layout in self.layouts:
            if (layout.side, layout.class_token) != (rules.side, rules.class_token):
                problem = f"images were laid out by other rules, of {layout.side} patches a side"
                fix = "lay them out by tile_rules(model.vision)"
                raise ConfigError("model.vision.patch_size", config.patch_size, problem, fix)
        if len(self.tiles_N3SS) != wanted:
            raise ConfigError("tiles", len(self.tiles_N3SS), f"{len(self.layouts)} images have {wanted} tiles",
                              "give all tiles of every image")  # fmt: skip


def tile_rules(config: VisionConfig) -> TileRules:
    """Return the rules by which a model's images become tiles and tokens, for the reader of data."""
    grids = tuple((rows, columns) for rows, columns in config.grids)
    return TileRules(config.tile_size, config.patch_size, grids, config.keep_class_token)


def normalise(tiles_N3SS: Tensor) -> Tensor:
    """Return tiles of uint8 as fp32, with CLIP's mean and deviation of each channel."""
    mean_311, std_311 = (tiles_N3SS.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (MEAN, STD))
    return tiles_N3SS.to(torch.float32).div_(255).sub_(mean_311).div_(std_311)  # in place: tiles are large


class TokenSources(NamedTuple):
    """Where the tokens of images come from.

    Attributes:
        patch_M: int64, which of the N Q tokens of the vision transformer each is.
        at_M: int64, its place among the I tokens; all other places are newlines.
        tokens: I.
    """

    patch_M: Tensor
    at_M: Tensor
    tokens: int


def token_sources(layouts: Sequence[ImageLayout]) -> TokenSources:
    """Return the sources of the tokens of some images, in their order, on the host."""
    source_I = source_of_tokens(layouts)
    at_M = (source_I >= 0).nonzero().flatten()
    return TokenSources(source_I[at_M], at_M, len(source_I))


def source_of_tokens(layouts: Sequence[ImageLayout]) -> Tensor:
    """Return which of the N Q tokens of the vision transformer each of the I tokens is, int64 on the host.

    A newline is -1.
    """
    sources, first_tile = [torch.empty(0, dtype=torch.int64)], 0
    for layout in layouts:
        tokens = _sources_of(layout)
        per_tile = layout.side**2 + 1
        sources.append(torch.where(tokens < 0, tokens, tokens + first_tile * per_tile))
        first_tile += layout.tiles
    return torch.cat(sources)


def _sources_of(layout: ImageLayout) -> Tensor:
    """Return which of its tiles' tokens each token of an image is, int64; -1 is a newline."""
    (rows, columns), side = layout.grid, layout.side
    per_tile = side**2 + 1  # the class token is the first
    thumbnail = torch.arange(0 if layout.class_token else 1, per_tile)
    if not rows:
        return torch.cat([thumbnail, torch.tensor([-1])])
    tiles = torch.arange(1, 1 + rows * columns).view(rows, 1, columns, 1) * per_tile
    patches = torch.arange(1, per_tile).view(1, side, 1, side)
    whole = (tiles + patches).reshape(rows * side, columns * side)
    kept = whole[layout.first_row :, layout.first_column :][: layout.rows, : layout.columns]
    lines = torch.cat([kept, kept.new_full((len(kept), 1), -1)], dim=1)
    return torch.cat([thumbnail, lines.flatten()])

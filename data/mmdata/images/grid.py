"""The grid of tiles that an image is cut into, and its number of tokens, from its width and height alone.

MiniMax-VL-01 (section 6) resizes an image to one of a list of resolutions, cuts it into square tiles, and adds a
thumbnail of the whole. The choice, the padding and the order of tokens are LLaVA-NeXT's, as the release's are: the grid
that keeps most of the image's pixels, and of those the one that wastes least; the image in the middle of it; tokens of
patches that are nothing but padding taken away again; a newline after each row of patches of the whole grid; the
thumbnail's tokens first.

The choice of a grid is computed as LLaVA-NeXT does, in float64 and in its order: there one rounding moves a floor, and
with it the choice. All else is in whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmdata.errors import DataError

Grid = tuple[int, int]
"""Tiles of a grid: (rows, columns)."""

RELEASED_GRIDS: tuple[Grid, ...] = tuple(
    (rows, columns) for rows, most in ((1, 6), (2, 6), (3, 6), (4, 4), (5, 3), (6, 3)) for columns in range(1, most + 1)
)
"""The 28 grids of the released configuration, in its order: 336 x 336 to 2016 x 1008 pixels, 18 tiles at most."""


@dataclass(frozen=True)
class TileRules:
    """The rules by which images become tiles and tokens.

    Attributes:
        tile: pixels of a tile's side.
        patch: pixels of a patch's side; a divisor of `tile`. Every patch is a token.
        grids: the grids to choose from; the first of equal ones is taken. None of them: the resolution is fixed, every
            image is one tile, stretched as a thumbnail is, as in the first stage of MiniMax-VL-01.
        class_token: the vision transformer's class token of the thumbnail is a token too, before its patches.
    """

    tile: int = 336
    patch: int = 14
    grids: tuple[Grid, ...] = RELEASED_GRIDS
    class_token: bool = False

    def __post_init__(self) -> None:
        if self.patch < 1 or self.tile < self.patch or self.tile % self.patch:
            raise DataError(
                f"tiles of {self.tile} pixels cannot be cut into patches of {self.patch}: the side of a patch must "
                "divide that of a tile, for example 336 and 14"
            )
        for grid in self.grids:
            if len(grid) != 2 or min(grid) < 1:
                raise DataError(f"a grid of tiles is {grid}: it must be (rows, columns), both at least 1")

    @property
    def side(self) -> int:
        """Patches of a tile's side; their square is the tokens of a tile."""
        return self.tile // self.patch


@dataclass(frozen=True)
class ImageLayout:
    """Tiles of one image, and which of their patches become tokens.

    Attributes:
        grid: tiles of the grid (rows, columns); (0, 0) where the resolution is fixed.
        side: patches of a tile's side.
        first_row: the first row of patches of the whole grid that is not padding.
        rows: rows of patches that are kept; as many are left out after them as before.
        first_column: the first column of patches that is kept.
        columns: columns that are kept.
        class_token: the thumbnail has a token more, before those of its patches.
    """

    grid: Grid
    side: int
    first_row: int
    rows: int
    first_column: int
    columns: int
    class_token: bool = False

    @property
    def tiles(self) -> int:
        """Tiles that the vision model sees: the thumbnail, and after it those of the grid, row by row."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of the image: the thumbnail's, then for each row of patches those that are kept and a newline.

        An image at a fixed resolution has one newline, at its end.
        """
        return self.class_token + self.side**2 + self.rows * self.columns + self.newlines

    @property
    def newlines(self) -> int:
        """Tokens that are a newline, not a patch: one after each row of patches that is kept, or the only one."""
        return self.rows if self.grid[0] else 1


def lay_image(width: int, height: int, rules: TileRules) -> ImageLayout:
    """Return the tiles and tokens of an image.

    An image so long that not one row (or column) of patches is left of its grid has those of its thumbnail, and, where
    the columns are gone, the newlines: LLaVA-NeXT counts so too.

    Args:
        width: of the decoded image, in pixels, after any turn that its metadata asks for.
        height: in pixels.
        rules: how images become tiles.

    Raises:
        DataError: the image has no pixels.
    """
    if width < 1 or height < 1:
        raise DataError(f"an image of {width} x {height} pixels: both sides must be at least 1")
    side, class_token = rules.side, rules.class_token
    if not rules.grids:
        return ImageLayout((0, 0), side, 0, 0, 0, 0, class_token)
    rows, columns = grid = best_grid(width, height, rules)
    rows, columns = rows * side, columns * side
    if width * rows > columns * height:
        above = (rows - height * columns // width) // 2
        return ImageLayout(grid, side, above, rows - 2 * above, 0, columns, class_token)
    before = (columns - width * rows // height) // 2
    return ImageLayout(grid, side, 0, rows, before, columns - 2 * before, class_token)


def best_grid(width: int, height: int, rules: TileRules) -> Grid:
    """Return the grid that an image of this size is resized to: (rows, columns) of tiles.

    A grid's effective resolution is the pixels of the image resized into it, but never more than the image has; what
    else of its area there is, is wasted. The most effective grid is taken, and of equally effective ones the least
    wasteful.
    """

    def merit(grid: Grid) -> tuple[int, int]:
        rows, columns = grid[0] * rules.tile, grid[1] * rules.tile
        scale = min(columns / width, rows / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - rows * columns

    return max(rules.grids, key=merit)  # of equal ones `max` takes the first


def fitted_size(width: int, height: int, layout: ImageLayout, rules: TileRules) -> tuple[int, int]:
    """Return the size (width, height) in pixels that an image is resized to, to lie in the middle of its grid.

    It is as large as fits, in the image's proportions. The other side is rounded down, as in the release's image
    processor (transformers' LLaVA-NeXT rounds it up), but has a pixel at least. At a fixed resolution it is a tile.
    """
    full_width, full_height = max(1, layout.grid[1]) * rules.tile, max(1, layout.grid[0]) * rules.tile
    if not layout.grid[0]:
        return full_width, full_height
    if width * full_height > full_width * height:
        return full_width, max(1, full_width * height // width)
    return max(1, full_height * width // height), full_height


def image_tokens(width: int, height: int, rules: TileRules) -> int:
    """Return the number of tokens of an image, which is that of its placeholders in a row (see :func:`lay_image`)."""
    return lay_image(width, height, rules).tokens

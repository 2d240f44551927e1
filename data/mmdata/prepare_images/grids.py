"""The list of grids as a command line spells it."""

from __future__ import annotations

import re

from mmdata.errors import DataError
from mmdata.images.grid import RELEASED_GRIDS, Grid


def parse_grids(text: str) -> tuple[Grid, ...]:
    """Grids that `--grids` means: "released", "fixed" (none: every image is one tile), or "1x2,2x1" (rows x columns).

    Raises:
        DataError: it is none of these, or names a grid twice.
    """
    if text == "released":
        return RELEASED_GRIDS
    if text == "fixed":
        return ()
    grids = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d?)x([1-9]\d?)\s*", part)
        if found is None:
            raise DataError(f'--grids is {text}: give "released", "fixed", or rows x columns as 1x1,1x2,2x1,2x2')
        grid = int(found[1]), int(found[2])
        if grid in grids:
            raise DataError(f"--grids is {text}: {part.strip()} is there twice, leave one out")
        grids.append(grid)
    return tuple(grids)

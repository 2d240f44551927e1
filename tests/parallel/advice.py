"""Reading the advice of a refused layout, for the tests of layouts."""

from __future__ import annotations

AXES = ("pp", "cp", "tp", "ep", "etp")


def advised(fix: str) -> list[dict[str, int]]:
    """The sets of overrides that the advice names."""
    sets = fix.removeprefix("give ").replace("parallel.", "").split(", or ")
    return [{name: int(value) for name, value in (one.split("=") for one in text.split(" "))} for text in sets]

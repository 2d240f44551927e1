"""Grid of an evaluation: kinds by lengths by depths, some samples in each place, and how it is made smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mmtrain.config import NeedlesConfig, PhaseConfig
from mmtrain.config.checks import require
from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.errors import ConfigError
from mmtrain.evals.sample import Cell, SampleBuilder

PARTS = (8, 4, 2, 1)  # of a phase's sequence length, where no lengths are given


@dataclass(frozen=True)
class Grid:
    """Samples of one evaluation.

    Attributes:
        kinds: of tasks.
        lengths: tokens of a sample, ascending.
        depths: of the needle.
        samples: of each kind, length and depth.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int

    def cells(self, length: int) -> list[Cell]:
        """Return the places of one length."""
        return [Cell(kind, length, depth) for kind, depth in product(self.kinds, self.depths)]

    @property
    def samples_of_length(self) -> int:
        """Number of samples of each length."""
        return len(self.kinds) * len(self.depths) * self.samples

    def thinner(self) -> Iterator[Grid]:
        """Yield smaller and smaller grids: fewer samples, then fewer depths, then one kind, then shorter lengths."""
        grid = self
        while grid.samples > 1:
            yield (grid := replace(grid, samples=grid.samples // 2))
        while (count := len(grid.depths)) > 1:
            depths = grid.depths[::2] if count > 3 else grid.depths[count // 2 :][:1]
            yield (grid := replace(grid, depths=depths))
        if len(grid.kinds) > 1:
            yield (grid := replace(grid, kinds=grid.kinds[:1]))
        while len(grid.lengths) > 1:
            yield (grid := replace(grid, lengths=grid.lengths[:-1]))

    def __str__(self) -> str:
        lengths = f"{self.lengths[0]:,}" + (f" to {self.lengths[-1]:,}" if len(self.lengths) > 1 else "")
        samples, depths = f"{self.samples} sample{'s'[: self.samples - 1]}", f"{len(self.depths)} depth"
        return f"{', '.join(self.kinds)} at {lengths} tokens, {depths}{'s'[: len(self.depths) - 1]} x {samples}"


def grid_of_phase(options: NeedlesConfig, phase: PhaseConfig, unit: int, builder: SampleBuilder) -> Grid | None:
    """Return the grid of a phase; None where its rows hold none of the lengths.

    Args:
        phase: with its scales applied.
        unit: tokens of a row must be a multiple of it.
    """
    kinds, seq_len = tuple(options.kinds or NEEDLE_KINDS), int(phase.seq_len)
    lengths = {int(length) for length in options.lengths if length <= seq_len}
    if not options.lengths:
        lengths = {seq_len // part // unit * unit for part in PARTS}
        lengths = {length for length in lengths if _too_short(options, kinds, length, builder) is None}
    if not lengths:
        return None
    return Grid(kinds, tuple(sorted(lengths)), tuple(options.depths), options.samples)


def check_grids(
    options: NeedlesConfig, phases: Sequence[PhaseConfig], builder: SampleBuilder, units: Sequence[int]
) -> list[Grid | None]:
    """Return the grid of each phase, and refuse lengths that cannot be built or are never run.

    Raises:
        ConfigError: a length is shorter than needles, question and answer, or is not a multiple of what `units` says
            of each phase; or the rows of no phase hold any of the lengths.
    """
    unit = math.lcm(*units)
    for i, length in enumerate(options.lengths):
        option = f"evals.needles.lengths[{i}]"
        require(length % unit == 0, option, length, f"is no multiple of {unit} (what the layouts share out a row by)",
                f"give {length // unit * unit or unit}")  # fmt: skip
        if (short := _too_short(options, tuple(options.kinds or NEEDLE_KINDS), length, builder)) is not None:
            kind, needed = short
            problem = f"needles, question and answer of kind {kind} take {needed} tokens"
            raise ConfigError(option, length, problem, f"give {needed + 1} or more, or other evals.needles.kinds")
    grids = [grid_of_phase(options, *one, builder) for one in zip(phases, units, strict=True)]
    longest = max(int(phase.seq_len) for phase in phases)
    if not any(grids):
        asked = [int(length) for length in options.lengths]
        problem = f"no phase's rows hold one: the longest have {longest} tokens"
        raise ConfigError("evals.needles.lengths", asked, problem, "give shorter ones, or evals.needles.enabled=false")
    return grids


def _too_short(
    options: NeedlesConfig, kinds: Sequence[str], length: int, builder: SampleBuilder
) -> tuple[str, int] | None:
    """Return the first kind that leaves no room for text, and the most tokens that it takes; None if all do."""
    for kind in kinds:
        cells = [Cell(kind, length, depth) for depth in options.depths]
        needed = max(builder.overhead(cell, index) for cell in cells for index in range(options.samples))
        if needed >= length:
            return kind, needed
    return None

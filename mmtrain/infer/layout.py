"""The ranks over which a model is laid for inference, refused before they meet where their numbers make no sense.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.config.process_env import read_processes
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import Layout, plan_layout

_SIZES = 1024  # looked through for those that would do


@dataclass(frozen=True)
class RankLayout:
    """Sizes of the axes, whose ranks all hold the same tokens: one that brings other requests would be another engine.

    Attributes:
        tp: ranks that share heads, widths of dense feed-forwards, and the vocabulary.
        ep: ranks that share the experts of a layer; they are ranks of tp too, as far as there are any.
        etp: ranks that share the width of each expert.
        cp: ranks that share the keys of every request and the reading of long prompts, each with all weights; with the
            other sizes at 1.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return max(self.tp, self.ep * self.etp, self.cp)

    def check_processes(self) -> None:
        """Refuse sizes that do not go together, or another number of processes than they take.

        Raises:
            ConfigError: the first option that is wrong, as the command line calls it.
        """
        for axis in ("tp", "ep", "etp", "cp"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"--{axis}", getattr(self, axis), "must be at least 1", "leave it out")
        experts = self.ep * self.etp
        if self.cp > 1 and self.tp * experts > 1:
            raise ConfigError("--cp", self.cp, "spreads the keys of a model that each rank has whole",
                              "leave --tp, --ep and --etp out, or --cp")  # fmt: skip
        if self.ranks % self.tp or self.ranks % experts:
            raise ConfigError("--tp", self.tp, f"--ep {self.ep} x --etp {self.etp} = {experts} ranks share experts, "
                              "and neither number divides the other", f"give --tp {experts}")  # fmt: skip
        world = read_processes().world_size
        if world == self.ranks:
            return
        if self.ranks > 1:
            option = next(f"--{axis}" for axis in ("cp", "tp", "ep", "etp") if self._takes_all(axis))
            raise ConfigError(option, getattr(self, option[2:]), f"takes {self.ranks} processes, not {world}",
                              f"start it with torchrun --nproc-per-node {self.ranks}")  # fmt: skip
        raise ConfigError("--tp", 1, f"{world} processes were started, and nothing says what they share",
                          f"give --tp {world}, or start one process")  # fmt: skip

    def _takes_all(self, axis: str) -> bool:
        """Whether an axis is the one to name where the number of processes is wrong."""
        return getattr(self, axis) == self.ranks if axis in ("cp", "tp") else getattr(self, axis) > 1

    def plan(self, model: ModelConfig) -> Layout:
        """Return the sizes of all axes for a model.

        Raises:
            ConfigError: an axis cannot split it; which sizes could.
        """
        parallel = ParallelConfig(tp=self.tp, ep=self.ep, etp=self.etp)  # ranks of cp are replicas to the weights
        try:
            return plan_layout(self.ranks, parallel, model)
        except ConfigError as error:
            axis = error.option.removeprefix("parallel.")
            if axis not in ("tp", "ep", "etp"):
                raise
            fits = [size for size in range(1, _SIZES) if _fits(axis, size, model)]
            raise ConfigError(f"--{axis}", getattr(self, axis), error.problem, f"give {_listed(fits)}") from None


ALONE_LAYOUT = RankLayout()
"""One process with the whole model."""


def _fits(axis: str, size: int, model: ModelConfig) -> bool:
    try:
        plan_layout(size, ParallelConfig(**{axis: size}), model)
    except ConfigError:
        return False
    return True


def _listed(sizes: list[int]) -> str:
    most = 8
    return ", ".join(map(str, sizes[:most])) + (", ..." if len(sizes) > most else "")

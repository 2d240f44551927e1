"""Options of a sweep: a grid of runs, their sizes and lengths, and how they are started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtrain.config.allowed import above, at_least, check_allowed, one_of
from mmtrain.config.checks import choose, require
from mmtrain.config.schema import Count, build

FREE_IN_SWEEP: Mapping[str, bool] = {"free_in_sweep": True}
"""The option may differ between launches of one sweep: it says how its runs are started, not what they are."""


@dataclass
class VariantConfig:
    """An architecture that a sweep may name.

    Attributes:
        name: of the architecture, as `sweep.architectures` and the points have it.
        overrides: what makes it, as on the command line of launch/pretrain.py.
    """

    name: str
    overrides: list[str]


@dataclass
class SizeConfig:
    """A size of the grid: a shape, or a number of parameters that a rule makes a shape of.

    Attributes:
        name: of the size, in names of runs.
        parameters: activated parameters without embeddings that the shape is to have; null: the shape is given.
        layers, hidden: depth and width; without them the rule of :mod:`mmtrain.runs.sweep.shapes` chooses both.
        heads: query heads; null: `hidden` / `sweep.head_dim`.
        kv_heads: key/value heads of softmax layers; null: `heads`, as the paper's count of 12 l d^2 has it.
        head_dim: width of a head; null takes `sweep.head_dim`.
        ffn: width of the feed-forward that a token meets, shared out over the `top_k` experts of a mixture; null: the
            width with which `parameters` are met best.
        lr: learning rate of this size, which takes the place of `sweep.lr`; null for none of its own.
    """

    name: str
    parameters: Count | None = None
    layers: int | None = field(default=None, metadata=at_least(1))
    hidden: int | None = field(default=None, metadata=at_least(1))
    heads: int | None = field(default=None, metadata=at_least(1))
    kv_heads: int | None = field(default=None, metadata=at_least(1))
    head_dim: int | None = field(default=None, metadata=at_least(1))
    ffn: int | None = field(default=None, metadata=at_least(1))
    lr: float | None = field(default=None, metadata=above(0))

    def validate(self, option: str) -> None:
        """Refuse a size that says too little."""
        require(bool(self.parameters) or None not in (self.layers, self.hidden, self.ffn), option, self.name,
                "is neither a number of parameters nor a whole shape",
                "give parameters: 70M, or layers, hidden and ffn")  # fmt: skip
        require((self.layers is None) == (self.hidden is None), option, self.name,
                "has one of layers and hidden", "give both, or neither and `parameters`")  # fmt: skip


@dataclass
class SlurmConfig:
    """Slurm jobs of a sweep, one a run.

    Attributes:
        partition: of the cluster; null takes its default.
        account: that is charged; null takes the user's own.
        minutes: time limit of a job.
        gpus: GPUs of a job; 0 for none.
        cpus: cores of each process.
        memory_gib: host memory of a job; null takes the cluster's default.
        extra: further lines of sbatch, as ["--constraint=h800"].
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = field(default=240, metadata=at_least(1))
    gpus: int = field(default=1, metadata=at_least(0))
    cpus: int = field(default=8, metadata=at_least(1))
    memory_gib: int | None = field(default=None, metadata=at_least(1))
    extra: list[str] = field(default_factory=list)


@dataclass
class SweepConfig:
    """A sweep: (architecture, size, length) x learning rates x batches x whatever overrides with several values add.

    Attributes:
        name: folder of the sweep below `dir`.
        dir: folder of sweeps.
        architectures: names of `variants` that are trained.
        variants: the architectures that can be named.
        sizes: shapes of the models.
        compute: operations of a run (forward and backward, head and attention counted): one isoFLOP group each.
        tokens: tokens of a run.
        tokens_per_parameter: tokens of a run for each activated parameter without embeddings. Only one of the
            three is given.
        lr: learning rates.
        lr_exponent: the learning rate of N parameters is lr x (N / lr_at)^lr_exponent; 0 is one for all sizes.
        lr_at: parameters at which it is `lr`.
        schedule: ``constant`` after the warm-up, so that a run's validations on the way count as points of shorter
            runs; ``cosine`` or ``linear`` to a tenth: the last validation alone counts.
        warmup: linear warm-up of the learning rate in steps; at most half of a run.
        batch_tokens: sizes of the global batch in tokens.
        seq_len: tokens of a row.
        validations: of a run, evenly spread, the last one at its end.
        head_dim: width of a head where a size has none of its own.
        aspect: hidden / layers that the rule for shapes aims at.
        layers_multiple: layers of a derived shape are a multiple of it: 8 keeps one softmax layer in eight.
        overrides: options of all runs, as on the command line of launch/pretrain.py; the command line's come after.
        fit: refuse a grid that no law can be fitted to, and fit one at the end.
        runner: ``local`` starts processes on this machine, ``slurm`` submits a job a run.
        runs_at_once: local runs at the same time on a CPU, and on each GPU.
        processes: processes (and GPUs) of a run.
        threads: threads of a process on a CPU; null shares the cores out.
        flops_per_second: of one run, from which the plan's seconds follow; null: measured ones alone
            (``--timing``, and runs that are done).
        slurm: of `runner=slurm`.
    """

    name: str
    dir: str = field(default="runs/sweeps", metadata=FREE_IN_SWEEP)
    architectures: list[str] = field(default_factory=list)
    variants: list[VariantConfig] = field(default_factory=list)
    sizes: list[SizeConfig] = field(default_factory=list)
    compute: list[float] = field(default_factory=list, metadata=above(0))
    tokens: list[Count] = field(default_factory=list, metadata=at_least(1))
    tokens_per_parameter: list[float] = field(default_factory=list, metadata=above(0))
    lr: list[float] = field(default_factory=list, metadata=above(0))
    lr_exponent: float = 0.0
    lr_at: Count | None = field(default=None, metadata=at_least(1))
    schedule: str = field(default="constant", metadata=one_of("constant", "cosine", "linear"))
    warmup: int = field(default=100, metadata=at_least(0, fix="0 is none"))
    batch_tokens: list[Count] = field(default_factory=list, metadata=at_least(1))
    seq_len: Count = field(default=Count(8192), metadata=at_least(1))
    validations: int = field(default=8, metadata=at_least(1, 1000))
    head_dim: int = field(default=64, metadata=at_least(2))
    aspect: float = field(default=64.0, metadata=above(0))
    layers_multiple: int = field(default=8, metadata=at_least(1))
    overrides: list[str] = field(default_factory=list)
    fit: bool = True
    runner: str = field(default="local", metadata={**FREE_IN_SWEEP, **one_of("local", "slurm")})
    runs_at_once: int = field(default=1, metadata={**FREE_IN_SWEEP, **at_least(1, 256)})
    processes: int = field(default=1, metadata={**FREE_IN_SWEEP, **at_least(1)})
    threads: int | None = field(default=None, metadata={**FREE_IN_SWEEP, **at_least(1)})
    flops_per_second: float | None = field(default=None, metadata={**FREE_IN_SWEEP, **above(0)})
    slurm: SlurmConfig = field(default_factory=SlurmConfig, metadata=FREE_IN_SWEEP)

    def validate(self) -> None:
        """Refuse grids that are empty, name nothing, or contradict themselves (ConfigError)."""
        check_allowed(self, "sweep")
        plain = bool(self.name.strip()) and "/" not in self.name and self.name.isprintable()
        problem = "must be a plain folder name, no slash in it and no dot in front"
        require(
            plain and not self.name.startswith("."), "sweep.name", self.name, problem, "for example sweep.name=first"
        )
        for name in ("architectures", "sizes", "lr", "batch_tokens"):
            require(bool(getattr(self, name)), f"sweep.{name}", "[]", "is empty: there is nothing to run",
                    "give at least one, or take one of the ready sweeps: sweep=tiny_cpu")  # fmt: skip
        self._validate_lengths()
        known = [variant.name for variant in self.variants]
        for name in self.architectures:
            choose("sweep.architectures", name, known)
        for name in ("architectures", "lr", "batch_tokens", "compute", "tokens", "tokens_per_parameter"):
            _no_twins(f"sweep.{name}", getattr(self, name))
        _no_twins("sweep.variants", known)
        _no_twins("sweep.sizes", [size.name for size in self.sizes])
        for i, size in enumerate(self.sizes):
            size.validate(f"sweep.sizes[{i}]")
        problem = f"lr_exponent={self.lr_exponent:g} needs a size to start from"
        require(self.lr_exponent == 0 or self.lr_at is not None, "sweep.lr_at", None, problem, "as in sweep.lr_at=70M")

    def _validate_lengths(self) -> None:
        given = [name for name in ("compute", "tokens", "tokens_per_parameter") if getattr(self, name)]
        require(len(given) == 1, "sweep.tokens", ", ".join(given) or "[]",
                "exactly one of compute, tokens and tokens_per_parameter says how long runs are",
                "give one of them, and the others as []")  # fmt: skip


def _no_twins(option: str, values: list[Any]) -> None:
    twins = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    require(not twins, option, values, f"has {', '.join(map(str, twins))} twice: points would be the same",
            "leave one out")  # fmt: skip


def load_sweep(values: Mapping[str, Any]) -> SweepConfig:
    """Build and check a sweep from a nested dict.

    Raises:
        ConfigError: the first option that is unknown, of the wrong type, or cannot work.
    """
    config = build(SweepConfig, values, "sweep")
    config.validate()
    return config

"""Options of a run that are neither the model, the stage nor the layout: data, optimizer, records, machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.checks import choose, require
from mmtrain.config.option_marks import FREE_ON_RESUME
from mmtrain.config.stage import SourceConfig


@dataclass
class DataConfig:
    """Corpora and tokenizer of a run, and how their rows are made.

    Attributes:
        path: one prepared corpus (shorthand for a single source).
        sources: a weighted mixture of prepared corpora; the first one's tokenizer is the run's.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; null takes it from the first corpus.
        packing: ``concat``, documents end to end, or ``best_fit``, whole documents in rows that end in padding: it is
            not routed, learned from or counted.
        valid_rows: rows of held-out text a validation reads; 0 turns validation off.
        valid_fraction: share of documents held out (by hash) where a corpus has no held-out file of its own.
        num_workers: loader processes a rank.
    """

    path: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str | None = None
    packing: str = "concat"
    seed: int = 1234
    valid_rows: int = 64
    valid_fraction: float = 0.01
    num_workers: int = field(default=1, metadata=FREE_ON_RESUME)

    @property
    def all_sources(self) -> list[SourceConfig]:
        """Corpora of the run: `sources`, or the one at `path`."""
        return self.sources or ([SourceConfig(self.path)] if self.path else [])

    def validate(self) -> None:
        """Refuse a run without data."""
        choose("data.packing", self.packing, ("concat", "best_fit"))
        require(not (self.path and self.sources), "data.path", self.path, "given besides data.sources", "keep one")
        require(bool(self.all_sources), "data.path", None, "no corpus given",
                 "prepare one with launch/prepare.py and give data.path=DIR")  # fmt: skip
        for i, source in enumerate(self.all_sources):
            require(source.weight > 0, f"data.sources[{i}].weight", source.weight, "must be above 0", "drop it")
        require(0 <= self.valid_fraction < 1, "data.valid_fraction", self.valid_fraction, "must lie in [0, 1)", "0.01")
        for name in ("num_workers", "valid_rows"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must not be negative", "0 is none")


@dataclass
class OptimConfig:
    """AdamW (MiniMax-01 section 4.2; epsilon, clipping and precision are not stated there).

    Attributes:
        name: ``adamw`` (torch), ``apex`` (NVIDIA's FusedAdam) or ``cpu_offload`` (DeepSpeedCPUAdam).
        decay_norms: apply weight decay to norm weights too.
        precision: compute type; ``auto`` is bf16 where the device multiplies it natively, else fp32. Master weights,
            optimizer state and gradient reduction are fp32 always.
        max_skipped: steps in a row whose loss or gradient is not finite after which the run stops; such steps leave the
            weights alone. Chosen here.
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = False
    clip_grad: float | None = 1.0
    precision: str = "auto"
    max_skipped: int = field(default=10, metadata=FREE_ON_RESUME)

    def validate(self) -> None:
        """Refuse unknown optimizers and factors out of range."""
        choose("optim.name", self.name, ("adamw", "apex", "cpu_offload"))
        choose("optim.precision", self.precision, ("auto", "bf16", "fp32"))
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)", "0.9")
        require(self.eps > 0, "optim.eps", self.eps, "must be above 0", "for example 1e-8")
        require(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", self.clip_grad,
                 "must be above 0", "null turns clipping off")  # fmt: skip
        require(self.max_skipped >= 1, "optim.max_skipped", self.max_skipped, "must be at least 1", "for example 10")


@dataclass
class LogConfig:
    """Reports of a run, and how often it makes them (in steps).

    Attributes:
        wandb: ``auto`` (online when logged in, else offline), ``offline`` or ``off``.
        tensorboard: write TensorBoard's files too, into the run's folder `tensorboard`.
        line_interval: steps between lines that stay in a terminal, beside the live one; 0 for none.
        valid_interval: steps between validations; 0 validates at the end only.
        plot: write a PNG of loss and router load at the end.
        gradient_fingerprints: write `gradients.json`, the norm and 16 projections of every parameter's gradient at the
            first step of the launch, which launch/compare.py compares between layouts.
    """

    wandb: str = "auto"
    wandb_project: str = "mmtrain"
    tensorboard: bool = False
    line_interval: int = 100
    valid_interval: int = 0
    plot: bool = True
    gradient_fingerprints: bool = False

    def validate(self) -> None:
        """Refuse unknown modes."""
        choose("log.wandb", self.wandb, ("auto", "offline", "off"))
        for name in ("valid_interval", "line_interval"):
            require(getattr(self, name) >= 0, f"log.{name}", getattr(self, name), "must not be negative", "0 is none")


@dataclass
class CheckpointConfig:
    """Checkpoints of a run: when they are written, and how many stay.

    Attributes:
        interval: steps between checkpoints; 0 writes one at the end only.
        keep: newest checkpoints kept; 0 keeps all.
    """

    interval: int = 1000
    keep: int = 2
    save_final: bool = True

    def validate(self) -> None:
        """Refuse negative numbers."""
        for name in ("interval", "keep"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "must not be negative", "0")


@dataclass
class ClusterConfig:
    """Machine that a run uses, and how long its ranks wait for each other.

    Attributes:
        device: ``auto`` (CUDA when there is one), ``cuda`` or ``cpu``.
        timeout_minutes: how long a collective may wait for a missing rank; a rank that shows no sign of life for half
            of it ends the run.
    """

    device: str = "auto"
    timeout_minutes: float = 10.0

    def validate(self) -> None:
        """Refuse unknown devices."""
        choose("cluster.device", self.device, ("auto", "cuda", "cpu"))
        require(self.timeout_minutes > 0, "cluster.timeout_minutes", self.timeout_minutes, "must be above 0", "10")


@dataclass
class RunConfig:
    """Identity of a run: its folder, what it starts from, where it stops.

    Attributes:
        name: folder of the run below `dir`.
        resume: ``never`` (refuse an existing run), ``auto`` (go on where it stopped, or start), or a checkpoint folder.
        init_from: run or checkpoint folder whose weights (and, by `init_optimizer`, moments) the run starts from.
        change_schedule: let a run that is resumed go on with another schedule than its checkpoint's: the phase at work
            may get other tokens, batches and learning rates, later phases may become anything.
        max_steps: stop after this many steps in all, for trials; null runs the stage to its end.
        seed: of the initial weights.
    """

    name: str = field(metadata=FREE_ON_RESUME)
    dir: str = field(default="runs", metadata=FREE_ON_RESUME)
    resume: str = field(default="never", metadata=FREE_ON_RESUME)
    init_from: str | None = field(default=None, metadata=FREE_ON_RESUME)
    init_optimizer: bool = field(default=True, metadata=FREE_ON_RESUME)
    change_schedule: bool = field(default=False, metadata=FREE_ON_RESUME)
    max_steps: int | None = field(default=None, metadata=FREE_ON_RESUME)
    seed: int = 1234

    def validate(self) -> None:
        """Refuse names that are not one folder."""
        require(bool(self.name) and "/" not in self.name and not self.name.startswith("."), "run.name", self.name,
                 "must be a plain folder name", "for example run.name=first")  # fmt: skip
        require(self.max_steps is None or self.max_steps >= 1, "run.max_steps", self.max_steps,
                 "must be at least 1", "null runs the stage to its end")  # fmt: skip

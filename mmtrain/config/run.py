"""Options of a run that are neither the model, the stage, the layout nor the machine: data, optimizer, records."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, one_of, share
from mmtrain.config.checks import require
from mmtrain.config.option_marks import FREE_ON_RESUME
from mmtrain.config.stage import SourceConfig


@dataclass
class DataConfig:
    """Corpora and tokenizer of a run, and how their rows are made.

    Attributes:
        path: one prepared corpus (shorthand for a single source). A run may be resumed with its corpora moved: their
            fingerprints are compared, not their paths.
        sources: a weighted mixture of prepared corpora; the first one's tokenizer is the run's.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; null takes it from the first corpus. It must be the
            one that the corpora were made with.
        packing: how documents fill rows: ``concat`` puts them end to end, ``best_fit`` keeps them whole in rows that
            end in padding, which is not routed, learned from or counted.
        seed: of the order of rows.
        valid_rows: rows of held-out text a validation reads; 0 turns validation off.
        valid_fraction: share of tokens held out (whole documents, by hash) where a corpus holds out none itself.
        num_workers: loader processes a rank; of rows with images, also threads that decode them.
        max_epochs: a warning names each corpus, or bucket of one, that the run reads more often than this, unless the
            source has a limit of its own; null never warns. (MiniMax-01: good text bears 4 epochs, poor text degrades
            the model after 2.)
        strict_epochs: refuse a run that reads a corpus more often than its limit, instead of warning.
        long_sources: corpora of long-context text that phases with a `long_share` mix into their last part; empty
            leaves it out.
        cache_dir: where indices of large corpora are kept; null: `.mmdata-index` beside each corpus or, where that
            cannot be written, `$XDG_CACHE_HOME/mmdata`.
        allow_changed: resume on corpora that have changed since the checkpoint, or start (`run.init_from`) from weights
            that were trained with another tokenizer.
    """

    path: str | None = field(default=None, metadata=FREE_ON_RESUME)
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str | None = field(default=None, metadata=FREE_ON_RESUME)
    packing: str = field(default="concat", metadata=one_of("concat", "best_fit"))
    seed: int = field(default=1234, metadata=at_least(0))
    valid_rows: int = field(default=64, metadata=at_least(0, fix="0 turns validation off"))
    valid_fraction: float = field(default=0.01, metadata=share())
    num_workers: int = field(default=1, metadata={**FREE_ON_RESUME, **at_least(0, fix="0 loads in the rank itself")})
    max_epochs: float | None = field(default=4.0, metadata={**FREE_ON_RESUME, **above(0, fix="null never warns")})
    strict_epochs: bool = field(default=False, metadata=FREE_ON_RESUME)
    long_sources: list[SourceConfig] = field(default_factory=list)
    cache_dir: str | None = field(default=None, metadata=FREE_ON_RESUME)
    allow_changed: bool = field(default=False, metadata=FREE_ON_RESUME)

    @property
    def all_sources(self) -> list[SourceConfig]:
        """Corpora of the run: `sources`, or the one at `path`."""
        return self.sources or ([SourceConfig(self.path)] if self.path else [])

    def validate(self) -> None:
        """Refuse a run without data."""
        check_allowed(self, "data")
        require(not (self.path and self.sources), "data.path", self.path, "given besides data.sources", "keep one")
        require(bool(self.all_sources), "data.path", None, "no corpus given",
                 "prepare one with launch/prepare.py and give data.path=DIR")  # fmt: skip


@dataclass
class OptimConfig:
    """AdamW (MiniMax-01 section 4.2; epsilon, clipping and precision are not stated there).

    Attributes:
        name: ``adamw`` (torch), ``apex`` (NVIDIA's FusedAdam) or ``cpu_offload`` (DeepSpeedCPUAdam).
        beta1: decay of the gradients' mean.
        beta2: decay of the gradients' mean square.
        eps: added to the root of the mean square.
        weight_decay: decoupled, times the learning rate; 0 turns it off.
        clip_grad: largest norm of the whole gradient, which is scaled down to it; null turns clipping off.
        decay_norms: apply weight decay to norm weights too.
        precision: compute type; ``auto`` is bf16 where the device multiplies it natively, else fp32. Master weights,
            optimizer state and gradient reduction are fp32 always.
        max_skipped: steps in a row whose loss or gradient is not finite after which the run stops; such steps leave the
            weights alone. Chosen here.
        frozen: parts of the model that phases leave as they are, unless they have a `frozen` of their own:
            ["embed_tokens", "layers.*.mixer"]. A part is a module or a parameter by its dotted name, with all in it;
            between dots ``*``, ``?`` and ``[0-3]`` are wildcards, and of patterns that fit the last one counts, where
            ``!`` in front takes a part out again: ["*", "!norm"]. What is frozen has no gradient, no state of the
            optimizer, no weight decay and no share of the gradient's norm.
    """

    name: str = field(default="adamw", metadata=one_of("adamw", "apex", "cpu_offload"))
    beta1: float = field(default=0.9, metadata=share())
    beta2: float = field(default=0.95, metadata=share())
    eps: float = field(default=1e-8, metadata=above(0))
    weight_decay: float = field(default=0.1, metadata=at_least(0, fix="0 turns it off"))
    decay_norms: bool = False
    clip_grad: float | None = field(default=1.0, metadata=above(0, fix="null turns clipping off"))
    precision: str = field(default="auto", metadata=one_of("auto", "bf16", "fp32"))
    max_skipped: int = field(default=10, metadata={**FREE_ON_RESUME, **at_least(1)})
    frozen: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Refuse unknown optimizers and factors out of range."""
        check_allowed(self, "optim")


@dataclass
class LogConfig:
    """Reports of a run, and how often it makes them (in steps).

    Attributes:
        wandb: ``auto`` (online when logged in, else offline), ``online`` (refused without a key),
            ``offline`` or ``off``.
        wandb_project: project that wandb files the run under.
        tensorboard: write TensorBoard's files too, into the run's folder `tensorboard`.
        line_interval: steps between lines that stay in a terminal, beside the live one; 0 for none.
        valid_interval: steps between validations; 0 validates at the end only.
        plot: write a PNG of loss and router load at the end.
        gradient_fingerprints: write `gradients.json`, the norm and 16 projections of every parameter's gradient at the
            first step of the launch, which launch/compare.py compares between layouts.
    """

    wandb: str = field(default="auto", metadata=one_of("auto", "online", "offline", "off"))
    wandb_project: str = "mmtrain"
    tensorboard: bool = False
    line_interval: int = field(default=100, metadata=at_least(0, fix="0 prints none"))
    valid_interval: int = field(default=0, metadata=at_least(0, fix="0 validates at the end only"))
    plot: bool = True
    gradient_fingerprints: bool = False

    def validate(self) -> None:
        """Refuse unknown modes."""
        check_allowed(self, "log")
        require(bool(self.wandb_project.strip()), "log.wandb_project", repr(self.wandb_project), "must not be empty",
                "for example log.wandb_project=mmtrain")  # fmt: skip


@dataclass
class CheckpointConfig:
    """Checkpoints of a run: when they are written, and how many stay.

    Attributes:
        interval: steps between checkpoints; 0 writes one at the end only.
        keep: newest checkpoints kept; 0 keeps all.
        keep_every: those of steps that this divides stay too; 0 for none.
        keep_phase_ends: write one at the end of each phase, and keep these too.
        keep_best: those of the lowest held-out losses stay too, so many of them; the loss counts that was measured at
            the checkpoint's own step (`log.valid_interval`).
        save_final: write one at the end of the run too.
        asynchronous: write while the run goes on, from a copy in host memory (of a rank's weights and moments; pinned
            where they are on a GPU); else the run waits.
        verify: read what a run begins with against its checksums, all of it, before it is loaded. Sizes and small files
            are always checked.
    """

    interval: int = field(default=1000, metadata=at_least(0, fix="0 writes one at the end only"))
    keep: int = field(default=2, metadata=at_least(0, fix="0 keeps all"))
    keep_every: int = field(default=0, metadata=at_least(0, fix="0 keeps the newest alone"))
    keep_phase_ends: bool = False
    keep_best: int = field(default=0, metadata=at_least(0, fix="0 keeps the newest alone"))
    save_final: bool = True
    asynchronous: bool = True
    verify: bool = True

    def validate(self) -> None:
        """Refuse negative numbers."""
        check_allowed(self, "checkpoint")


@dataclass
class RunConfig:
    """Identity of a run: its folder, what it starts from, where it stops.

    Attributes:
        name: folder of the run below `dir`; required.
        dir: folder of runs.
        resume: ``never`` (refuse an existing run), ``auto`` (go on where it stopped, or start), or a checkpoint folder.
        init_from: run or checkpoint folder whose weights (and, by `init_optimizer`, moments) the run starts from; or a
            Hugging Face folder of a MiniMax-Text-01 model, whose weights it starts from.
        init_optimizer: take AdamW's moments from there too.
        init_parts: parts of the model that are taken from there, named as those of `optim.frozen`: [encoder] takes the
            eyes alone; all others, and AdamW's moments, begin anew. Projector and newline begin anew too if the text
            models' widths differ. [] takes all.
        init_eyes: what a model with eyes takes these from, in place of `init_from`: a run or a checkpoint, or a Hugging
            Face folder of MiniMax-VL-01, of CLIP, or of LLaVA with CLIP's vision tower. Projector and newline begin
            anew where the text models' widths differ, and of a folder that is not MiniMax-VL-01's; AdamW's moments
            begin anew, of the text too.
        change_schedule: let a run that is resumed go on with another schedule than its checkpoint's: the phase at work
            may get other tokens, batches and learning rates, later phases may become anything.
        max_steps: stop after this many steps in all, for trials; null runs the stage to its end.
        seed: of the initial weights.
        plan: print the table of all phases, with their memory, and start nothing; `--plan` is the same.
        plan_processes: number of processes to plan for; null: those that were started.
    """

    name: str = field(metadata=FREE_ON_RESUME)
    dir: str = field(default="runs", metadata=FREE_ON_RESUME)
    resume: str = field(default="never", metadata=FREE_ON_RESUME)
    init_from: str | None = field(default=None, metadata=FREE_ON_RESUME)
    init_optimizer: bool = field(default=True, metadata=FREE_ON_RESUME)
    init_parts: list[str] = field(default_factory=list, metadata=FREE_ON_RESUME)
    init_eyes: str | None = field(default=None, metadata=FREE_ON_RESUME)
    change_schedule: bool = field(default=False, metadata=FREE_ON_RESUME)
    max_steps: int | None = field(
        default=None, metadata={**FREE_ON_RESUME, **at_least(1, fix="null runs the stage to its end")}
    )
    seed: int = field(default=1234, metadata=at_least(0))
    plan: bool = field(default=False, metadata=FREE_ON_RESUME)
    plan_processes: int | None = field(
        default=None, metadata={**FREE_ON_RESUME, **at_least(1, fix="null plans for the processes that are started")}
    )

    def validate(self) -> None:
        """Refuse names that are not one folder."""
        plain = bool(self.name.strip()) and "/" not in self.name and self.name.isprintable()
        problem = "must be a plain folder name, no slash in it and no dot in front"
        require(plain and not self.name.startswith("."), "run.name", self.name, problem, "for example run.name=first")
        require(not self.init_parts or self.init_from is not None, "run.init_parts", self.init_parts,
                "there is nothing to take them from", "give run.init_from=RUN")  # fmt: skip
        check_allowed(self, "run")

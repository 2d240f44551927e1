"""Every option of a run, typed, with the checks that need no data and no device.

The groups mirror `configs/`: model, stage, parallel, data, optim, log, checkpoint, cluster, and `run`. Checks raise
:class:`~mmtrain.errors.ConfigError` before anything is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtrain.errors import ConfigError, nearest
from mmtrain.schema import Count, build

SOFTMAX, LIGHTNING = "S", "L"


def _choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(option, value, "not a known choice", nearest(value, allowed))


def _require(ok: bool, option: str, value: Any, problem: str, fix: str) -> None:
    if not ok:
        raise ConfigError(option, value, problem, fix)


@dataclass
class ModelConfig:
    """The architecture (MiniMax-01 section 2; the released config.json gives the defaults of `minimax_text_01`).

    Attributes:
        layer_pattern: one letter a layer, repeated over the depth: ``L`` lightning, ``S`` softmax attention.
        num_kv_heads: key/value heads of the softmax layers.
        rotary_dim: leading dimensions of each softmax head that RoPE rotates.
        rope_base: RoPE base until a phase sets another.
        ffn_hidden_size: width inside an expert, or of the dense feed-forward when `num_experts` is 0.
        shared_ffn_hidden_size: width of a shared expert gated per token; 0 turns it off, as released.
        capacity_factor: expert capacity over the even share; null drops nothing.
        drop_policy: which assignments over capacity go: lowest router probability, or latest position.
        post_norm: DeepNorm post-norm residuals (as released); false is the pre-norm variant.
        deepnorm_alpha: residual factor; null derives (2N)^(1/4) when post_norm, else 1.
        deepnorm_beta: initial gain of value, output and feed-forward matrices; null derives (8N)^(-1/4), else 1.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    layer_pattern: str = "LLLLLLLS"
    rotary_dim: int = 64
    rope_base: float = 10_000.0
    num_experts: int = 32
    top_k: int = 2
    shared_ffn_hidden_size: int = 0
    capacity_factor: float | None = 1.25
    drop_policy: str = "probs"
    aux_loss_coef: float = 0.01
    post_norm: bool = True
    deepnorm_alpha: float | None = None
    deepnorm_beta: float | None = None
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    loss_chunk_tokens: int = 1024

    @property
    def layer_types(self) -> str:
        """One letter a layer, `layer_pattern` repeated to `num_layers`."""
        repeats = -(-self.num_layers // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.num_layers]

    @property
    def inner_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def alpha(self) -> float:
        """DeepNorm residual factor (MiniMax-01 section 4.2)."""
        if self.deepnorm_alpha is not None:
            return self.deepnorm_alpha
        return (2 * self.num_layers) ** 0.25 if self.post_norm else 1.0

    @property
    def beta(self) -> float:
        """DeepNorm initial gain (MiniMax-01 section 4.2)."""
        if self.deepnorm_beta is not None:
            return self.deepnorm_beta
        return (8 * self.num_layers) ** -0.25 if self.post_norm else 1.0

    def validate(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "ffn_hidden_size", "loss_chunk_tokens"):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}", value, "must be at least 1", "give a positive number")
        wrong = set(self.layer_pattern) - {LIGHTNING, SOFTMAX}
        _require(bool(self.layer_pattern) and not wrong, "model.layer_pattern", self.layer_pattern,
                 "may hold only L (lightning) and S (softmax)", "for example LLLLLLLS")  # fmt: skip
        _require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                 f"must divide num_heads={self.num_heads}", "choose a divisor")  # fmt: skip
        _require(0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0, "model.rotary_dim",
                 self.rotary_dim, f"must be even and at most head_dim={self.head_dim}",
                 f"for example model.rotary_dim={self.head_dim // 4 * 2}")  # fmt: skip
        _require(self.num_experts >= 0, "model.num_experts", self.num_experts, "must not be negative", "0 is dense")
        if self.num_experts:
            for name in ("hidden_size", "ffn_hidden_size"):
                value = getattr(self, name)
                fix = f"for example model.{name}={-(-value // 8) * 8}"
                _require(value % 8 == 0, f"model.{name}", value, "must be a multiple of 8 with experts", fix)
            _require(1 <= self.top_k <= self.num_experts, "model.top_k", self.top_k,
                     f"must lie between 1 and num_experts={self.num_experts}", "lower it or add experts")  # fmt: skip
            _require(self.capacity_factor is None or self.capacity_factor > 0, "model.capacity_factor",
                     self.capacity_factor, "must be above 0", "null turns dropping off")  # fmt: skip
        _require(self.shared_ffn_hidden_size >= 0, "model.shared_ffn_hidden_size", self.shared_ffn_hidden_size,
                 "must not be negative", "0 turns it off")  # fmt: skip
        _choose("model.drop_policy", self.drop_policy, ("probs", "position"))
        _require(self.rope_base > 1, "model.rope_base", self.rope_base, "must be above 1", "for example 10000")


@dataclass
class LrSegment:
    """A stretch of the learning-rate schedule, `tokens` long.

    Attributes:
        kind: ``linear`` or ``exponential`` from `start` to `end`, or ``constant`` at `end`.
    """

    kind: str
    tokens: Count
    end: float
    start: float = 0.0

    def validate(self, option: str) -> None:
        """Refuse shapes of schedule that are not defined."""
        _choose(f"{option}.kind", self.kind, ("linear", "constant", "exponential"))
        _require(min(self.start, self.end) >= 0, f"{option}.end", self.end, "must not be negative", "for example 2e-4")
        _require(self.kind != "exponential" or (self.start > 0 and self.end > 0), f"{option}.start", self.start,
                 "exponential decay needs start and end above 0", "give both")  # fmt: skip


@dataclass
class BatchStep:
    """The global batch, in tokens, from `at` consumed tokens of the phase on."""

    at: Count
    tokens: Count


@dataclass
class SourceConfig:
    """One prepared corpus of a mixture."""

    path: str
    weight: float = 1.0


@dataclass
class PhaseConfig:
    """A stretch of training with one sequence length and one RoPE base (MiniMax-01 Table 6).

    Attributes:
        tokens: length of the phase.
        batch: batch-size ramp by tokens consumed in the phase; the first entry starts at 0.
        lr: learning-rate segments by tokens consumed in the phase; the last one's end value holds on.
        sources: mixture for this phase; null takes `data.sources`.
    """

    name: str
    seq_len: Count
    rope_base: float
    tokens: Count
    batch: list[BatchStep]
    lr: list[LrSegment]
    sources: list[SourceConfig] | None = None

    def validate(self, option: str) -> None:
        """Refuse phases that cannot run."""
        _require(self.seq_len >= 1, f"{option}.seq_len", self.seq_len, "must be at least 1", "raise it or stage.scale")
        _require(self.tokens >= 1, f"{option}.tokens", self.tokens, "must be at least 1", "raise it or the scales")
        _require(bool(self.batch) and self.batch[0].at == 0, f"{option}.batch", [b.at for b in self.batch],
                 "the ramp must start at 0 tokens", "add {at: 0, tokens: ...}")  # fmt: skip
        ats = [step.at for step in self.batch]
        _require(ats == sorted(set(ats)), f"{option}.batch", ats, "ramp points must increase", "sort them")
        for i, step in enumerate(self.batch):
            _require(step.tokens >= 1, f"{option}.batch[{i}].tokens", step.tokens, "must be at least 1", "give tokens")
        for i, source in enumerate(self.sources or []):
            _require(source.weight > 0, f"{option}.sources[{i}].weight", source.weight, "must be above 0", "drop it")
        _require(bool(self.lr), f"{option}.lr", self.lr, "needs at least one segment", "add {kind: constant, ...}")
        for i, segment in enumerate(self.lr):
            segment.validate(f"{option}.lr[{i}]")


@dataclass
class StageConfig:
    """A run's phases, in order.

    Attributes:
        scale: multiplies sequence lengths, tokens, batches and schedule lengths alike, so that the number of steps and
            of rows in a batch stay as they are.
        token_scale: multiplies tokens and schedule lengths again, for fewer steps.
        batch_scale: multiplies batches again, for fewer rows.
    """

    name: str
    phases: list[PhaseConfig]
    scale: float = 1.0
    token_scale: float = 1.0
    batch_scale: float = 1.0

    def validate(self) -> None:
        """Refuse empty stages and senseless scales."""
        _require(bool(self.phases), "stage.phases", [], "needs at least one phase", "choose +stage=pretrain")
        for name in ("scale", "token_scale", "batch_scale"):
            _require(getattr(self, name) > 0, f"stage.{name}", getattr(self, name), "must be above 0", "1 is unscaled")
        for i, phase in enumerate(self.phases):
            phase.validate(f"stage.phases[{i}]")


@dataclass
class ParallelConfig:
    """How the model is laid over processes.

    Attributes:
        micro_batch_rows: rows that one process runs at once.
        activation_checkpoint: recompute each block in backward.
        reshard_after_forward: free gathered parameters between forward and backward (ZeRO-3) or keep them (ZeRO-2).
        sync_every_micro_batch: reduce gradients after every micro-batch (less memory) or once a step.
    """

    micro_batch_rows: int = 1
    activation_checkpoint: bool = False
    reshard_after_forward: bool = True
    sync_every_micro_batch: bool = False

    def validate(self) -> None:
        """Refuse empty micro-batches."""
        _require(self.micro_batch_rows >= 1, "parallel.micro_batch_rows", self.micro_batch_rows,
                 "must be at least 1", "for example 1")  # fmt: skip


@dataclass
class DataConfig:
    """What is read.

    Attributes:
        path: one prepared corpus (shorthand for a single source).
        sources: a weighted mixture of prepared corpora; the first one's tokenizer is the run's.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; null takes it from the first corpus.
        packing: ``concat`` or ``best_fit``.
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
    num_workers: int = 1

    @property
    def all_sources(self) -> list[SourceConfig]:
        """`sources`, or the one at `path`."""
        return self.sources or ([SourceConfig(self.path)] if self.path else [])

    def validate(self) -> None:
        """Refuse a run without data."""
        _choose("data.packing", self.packing, ("concat", "best_fit"))
        _require(not (self.path and self.sources), "data.path", self.path, "given besides data.sources", "keep one")
        _require(bool(self.all_sources), "data.path", None, "no corpus given",
                 "prepare one with launch/prepare.py and give data.path=DIR")  # fmt: skip
        for i, source in enumerate(self.all_sources):
            _require(source.weight > 0, f"data.sources[{i}].weight", source.weight, "must be above 0", "drop it")
        _require(0 <= self.valid_fraction < 1, "data.valid_fraction", self.valid_fraction, "must lie in [0, 1)", "0.01")
        for name in ("num_workers", "valid_rows"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "must not be negative", "0 is none")


@dataclass
class OptimConfig:
    """AdamW (MiniMax-01 section 4.2; epsilon, clipping and precision are not stated there).

    Attributes:
        name: ``adamw`` (torch), ``apex`` (NVIDIA's FusedAdam) or ``cpu_offload`` (DeepSpeedCPUAdam).
        decay_norms: apply weight decay to norm weights too.
        precision: compute type; ``auto`` is bf16 where the device multiplies it natively, else fp32. Master weights,
            optimizer state and gradient reduction are fp32 always.
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = False
    clip_grad: float | None = 1.0
    precision: str = "auto"

    def validate(self) -> None:
        """Refuse unknown optimizers and factors out of range."""
        _choose("optim.name", self.name, ("adamw", "apex", "cpu_offload"))
        _choose("optim.precision", self.precision, ("auto", "bf16", "fp32"))
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)", "0.9")
        _require(self.eps > 0, "optim.eps", self.eps, "must be above 0", "for example 1e-8")
        _require(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", self.clip_grad,
                 "must be above 0", "null turns clipping off")  # fmt: skip


@dataclass
class LogConfig:
    """What is reported, and how often (in steps).

    Attributes:
        wandb: ``auto`` (online when logged in, else offline), ``offline`` or ``off``.
        valid_interval: steps between validations; 0 validates at the end only.
        plot: write a PNG of loss and router load at the end.
    """

    wandb: str = "auto"
    wandb_project: str = "mmtrain"
    valid_interval: int = 0
    plot: bool = True

    def validate(self) -> None:
        """Refuse unknown modes."""
        _choose("log.wandb", self.wandb, ("auto", "offline", "off"))
        _require(self.valid_interval >= 0, "log.valid_interval", self.valid_interval, "must not be negative", "0")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many stay.

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
            _require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "must not be negative", "0")


@dataclass
class ClusterConfig:
    """The machine.

    Attributes:
        device: ``auto`` (CUDA when there is one), ``cuda`` or ``cpu``.
        timeout_minutes: how long a collective may wait for a missing rank.
    """

    device: str = "auto"
    timeout_minutes: float = 10.0

    def validate(self) -> None:
        """Refuse unknown devices."""
        _choose("cluster.device", self.device, ("auto", "cuda", "cpu"))
        _require(self.timeout_minutes > 0, "cluster.timeout_minutes", self.timeout_minutes, "must be above 0", "10")


@dataclass
class RunConfig:
    """One run.

    Attributes:
        name: folder of the run below `dir`.
        resume: ``never`` (refuse an existing run), ``auto`` (go on where it stopped, or start), or a checkpoint folder.
        init_from: run or checkpoint folder whose weights (and, by `init_optimizer`, moments) the run starts from.
        max_steps: stop after this many steps in all, for trials; null runs the stage to its end.
        seed: of the initial weights.
    """

    name: str
    dir: str = "runs"
    resume: str = "never"
    init_from: str | None = None
    init_optimizer: bool = True
    max_steps: int | None = None
    seed: int = 1234

    def validate(self) -> None:
        """Refuse names that are not one folder."""
        _require(bool(self.name) and "/" not in self.name and not self.name.startswith("."), "run.name", self.name,
                 "must be a plain folder name", "for example run.name=first")  # fmt: skip
        _require(self.max_steps is None or self.max_steps >= 1, "run.max_steps", self.max_steps,
                 "must be at least 1", "null runs the stage to its end")  # fmt: skip


@dataclass
class PretrainConfig:
    """Everything that `launch/pretrain.py` reads."""

    model: ModelConfig
    stage: StageConfig
    data: DataConfig
    run: RunConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def validate(self) -> None:
        """Run every group's checks.

        Raises:
            ConfigError: the first option that cannot work.
        """
        for group in (self.model, self.stage, self.data, self.run, self.parallel, self.optim, self.log,
                      self.checkpoint, self.cluster):  # fmt: skip
            group.validate()


def load_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Build and check a whole configuration from a nested dict.

    Raises:
        ConfigError: the first option that is unknown, of the wrong type, or cannot work.
    """
    config = build(PretrainConfig, values)
    config.validate()
    return config

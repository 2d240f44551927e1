"""Options of the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_uppercase

from mmtrain.config.checks import choose, require
from mmtrain.config.option_marks import SHAPES_WEIGHTS


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
    vocab_size: int = field(metadata=SHAPES_WEIGHTS)
    hidden_size: int = field(metadata=SHAPES_WEIGHTS)
    num_layers: int = field(metadata=SHAPES_WEIGHTS)
    num_heads: int = field(metadata=SHAPES_WEIGHTS)
    num_kv_heads: int = field(metadata=SHAPES_WEIGHTS)
    head_dim: int = field(metadata=SHAPES_WEIGHTS)
    ffn_hidden_size: int = field(metadata=SHAPES_WEIGHTS)
    layer_pattern: str = field(default="LLLLLLLS", metadata=SHAPES_WEIGHTS)
    rotary_dim: int = 64
    rope_base: float = 10_000.0
    num_experts: int = field(default=32, metadata=SHAPES_WEIGHTS)
    top_k: int = 2
    shared_ffn_hidden_size: int = field(default=0, metadata=SHAPES_WEIGHTS)
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
            require(value >= 1, f"model.{name}", value, "must be at least 1", "give a positive number")
        letters = bool(self.layer_pattern) and set(self.layer_pattern) <= set(ascii_uppercase)
        require(letters, "model.layer_pattern", self.layer_pattern, "must be capital letters, one a kind of layer",
                 "for example LLLLLLLS")  # fmt: skip
        require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                 f"must divide num_heads={self.num_heads}", "choose a divisor")  # fmt: skip
        require(0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0, "model.rotary_dim",
                 self.rotary_dim, f"must be even and at most head_dim={self.head_dim}",
                 f"for example model.rotary_dim={self.head_dim // 4 * 2}")  # fmt: skip
        require(self.num_experts >= 0, "model.num_experts", self.num_experts, "must not be negative", "0 is dense")
        if self.num_experts:
            for name in ("hidden_size", "ffn_hidden_size"):
                value = getattr(self, name)
                fix = f"for example model.{name}={-(-value // 8) * 8}"
                require(value % 8 == 0, f"model.{name}", value, "must be a multiple of 8 with experts", fix)
            require(1 <= self.top_k <= self.num_experts, "model.top_k", self.top_k,
                     f"must lie between 1 and num_experts={self.num_experts}", "lower it or add experts")  # fmt: skip
            require(self.capacity_factor is None or self.capacity_factor > 0, "model.capacity_factor",
                     self.capacity_factor, "must be above 0", "null turns dropping off")  # fmt: skip
        require(self.shared_ffn_hidden_size >= 0, "model.shared_ffn_hidden_size", self.shared_ffn_hidden_size,
                 "must not be negative", "0 turns it off")  # fmt: skip
        choose("model.drop_policy", self.drop_policy, ("probs", "position"))
        require(self.rope_base > 1, "model.rope_base", self.rope_base, "must be above 1", "for example 10000")

"""Options of the architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from string import ascii_uppercase

from mmtrain.config.allowed import above, at_least, check_allowed, one_of
from mmtrain.config.checks import require
from mmtrain.config.option_marks import SHAPES_WEIGHTS
from mmtrain.config.vision import VisionConfig


@dataclass
class ModelConfig:
    """The architecture (MiniMax-01 section 2; the released config.json gives the defaults of `minimax_text_01`).

    Attributes:
        name: of the architecture, for records; it chooses nothing.
        vocab_size: rows of the embedding and of the head; at least the tokenizer's number of tokens.
        hidden_size: width of the residual stream.
        num_layers: depth; each layer is a mixer and a feed-forward or a mixture of experts.
        num_heads: query heads of the softmax layers, and heads of the lightning layers.
        head_dim: width of a head.
        layer_pattern: one letter a layer, repeated over the depth: ``L`` lightning, ``S`` softmax attention.
        num_kv_heads: key/value heads of the softmax layers; a divisor of `num_heads`.
        rotary_dim: leading dimensions of each softmax head that RoPE rotates; even, at most `head_dim`.
        rope_base: RoPE base until a phase sets another.
        num_experts: experts of a layer; 0 is a dense feed-forward.
        top_k: experts that a token goes to.
        ffn_hidden_size: width inside an expert, or of the dense feed-forward when `num_experts` is 0.
        shared_ffn_hidden_size: width of a shared expert gated per token; 0 turns it off, as released.
        capacity_factor: expert capacity over the even share; null drops nothing.
        drop_policy: which assignments over capacity go: lowest router probability (``probs``), or latest position.
        aux_loss_coef: factor of the auxiliary loss that balances the experts' loads; 0 turns it off.
        post_norm: DeepNorm post-norm residuals (as released); false is the pre-norm variant.
        deepnorm_alpha: residual factor; null derives (2N)^(1/4) when post_norm, else 1.
        deepnorm_beta: initial gain of value, output and feed-forward matrices; null derives (8N)^(-1/4), else 1.
        norm_eps: epsilon of the norms, but of those inside lightning attention.
        lightning_norm_eps: epsilon of the norm inside lightning attention.
        loss_chunk_tokens: tokens whose logits exist at the same time, which bounds their memory.
        vision: eyes; null is a model of text alone.
    """

    name: str
    vocab_size: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    hidden_size: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    num_layers: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    num_heads: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    num_kv_heads: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    head_dim: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    ffn_hidden_size: int = field(metadata={**SHAPES_WEIGHTS, **at_least(1)})
    layer_pattern: str = field(default="LLLLLLLS", metadata=SHAPES_WEIGHTS)
    rotary_dim: int = field(default=64, metadata=at_least(0))
    rope_base: float = field(default=10_000.0, metadata=above(1))
    num_experts: int = field(default=32, metadata={**SHAPES_WEIGHTS, **at_least(0, fix="0 is dense")})
    top_k: int = field(default=2, metadata=at_least(1))
    shared_ffn_hidden_size: int = field(default=0, metadata={**SHAPES_WEIGHTS, **at_least(0, fix="0 turns it off")})
    capacity_factor: float | None = field(default=1.25, metadata=above(0, fix="null turns dropping off"))
    drop_policy: str = field(default="probs", metadata=one_of("probs", "position"))
    aux_loss_coef: float = field(default=0.01, metadata=at_least(0))
    post_norm: bool = True
    deepnorm_alpha: float | None = field(default=None, metadata=above(0, fix="null derives it from the depth"))
    deepnorm_beta: float | None = field(default=None, metadata=above(0, fix="null derives it from the depth"))
    norm_eps: float = field(default=1e-5, metadata=above(0))
    lightning_norm_eps: float = field(default=1e-6, metadata=above(0))
    loss_chunk_tokens: int = field(default=1024, metadata=at_least(1))
    vision: VisionConfig | None = None

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
        check_allowed(self, "model")
        letters = bool(self.layer_pattern) and set(self.layer_pattern) <= set(ascii_uppercase)
        require(letters, "model.layer_pattern", self.layer_pattern, "must be capital letters, one a kind of layer",
                 "for example LLLLLLLS")  # fmt: skip
        require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                 f"must divide num_heads={self.num_heads}", f"give one of {_divisors(self.num_heads)}")  # fmt: skip
        require(self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0, "model.rotary_dim",
                 self.rotary_dim, f"must be even and at most head_dim={self.head_dim}",
                 f"for example model.rotary_dim={self.head_dim // 4 * 2}")  # fmt: skip
        if self.num_experts:
            for name in ("hidden_size", "ffn_hidden_size"):
                value = getattr(self, name)
                fix = f"for example model.{name}={-(-value // 8) * 8}"
                require(value % 8 == 0, f"model.{name}", value, "must be a multiple of 8 with experts", fix)
            require(self.top_k <= self.num_experts, "model.top_k", self.top_k,
                     f"must lie between 1 and num_experts={self.num_experts}", "lower it or add experts")  # fmt: skip
        if self.vision is not None:
            self.vision.validate(self.vocab_size)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)

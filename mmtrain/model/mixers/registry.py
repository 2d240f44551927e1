"""The token mixers that `model.layer_pattern` can name, with all that other parts of the program know about them.

A mixer is one entry of :data:`MIXERS` and one file. The classes are named by their import path and loaded when one is
built, because layouts are planned, and operations counted, without torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from mmtrain.config import ModelConfig
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError

if TYPE_CHECKING:
    from mmtrain.model.mixers.batch_cache import BatchCache
    from mmtrain.model.mixers.mixer import Mixer


class Placement(Enum):
    """Layout of a parameter over the ranks of tensor parallelism."""

    ROWS = "rows"
    COLUMNS = "columns"
    REPLICATED = "replicated"


@dataclass(frozen=True)
class MixerMemory:
    """Elements a token that a layer's mixer holds, of the type that it computes in unless said otherwise.

    Attributes:
        kept: between forward and backward, beside the mixer's input.
        kept_fp32: float32 elements likewise.
        backward: the most that its backward takes beside those: gradients.
        recorded_backward: likewise inside of CUDA graphs; None: the same.
        attention_output: the part of `kept` that is the result of attention whose cost grows with a document's length.
        attention_fp32: the part of `kept_fp32` that belongs to it.
        state: float32 elements of the state that a chunk of a row leaves; whoever shares rows holds one for each.
    """

    kept: int
    backward: int
    kept_fp32: int = 0
    recorded_backward: int | None = None
    attention_output: int = 0
    attention_fp32: int = 0
    state: int = 0


@dataclass(frozen=True)
class CacheSize:
    """Elements that a layer's mixer remembers while it serves.

    Attributes:
        token: of each token, in the type of the weights, in pages.
        document: of each document, however long, in float32, in slots.
    """

    token: int = 0
    document: int = 0


@dataclass(frozen=True)
class MixerSpec:
    """A kind of mixer.

    Attributes:
        letter: stands for a layer of it in `model.layer_pattern`.
        name: its name in counts of parameters and operations.
        module: import path of its class, made from the configuration and the layer's number.
        matrix_weights: elements of a layer's matrices, with each of which a token is multiplied once.
        vector_weights: elements of a layer's other parameters.
        attention_flops: operations of the forward pass of a layer, beside those with its matrices, over packed
            documents of these lengths; a product of [m, k] by [k, n] counts 2mnk.
        placements: of every parameter, by its name in the mixer, for a size of tp. The output projection's columns
            are split, so that ranks' results are summed.
        tp_problem: why a size of tp cannot split the heads of a model, as text; empty if it can.
        context_parallel: whether it meets other tokens through an attention call alone, so that ranks can share a row.
        memory: what a layer of it holds on each of tp ranks; None: guessed from its matrices.
        grouped_memory: the same where it works on so many groups of heads one after the other; None: it cannot.
        batch_cache: import path of the class of what serving remembers of many documents in one layer, a
            :class:`~mmtrain.model.mixers.batch_cache.BatchCache`; None: it cannot be served.
        cache_size: how much that is.
    """

    letter: str
    name: str
    module: str
    matrix_weights: Callable[[ModelConfig], int]
    vector_weights: Callable[[ModelConfig], int]
    attention_flops: Callable[[ModelConfig, Sequence[int]], int]
    placements: Callable[[ModelConfig, int], Mapping[str, Placement]]
    tp_problem: Callable[[ModelConfig, int], str]
    context_parallel: bool = False
    memory: Callable[[ModelConfig, int], MixerMemory] | None = None
    grouped_memory: Callable[[ModelConfig, int, int], MixerMemory] | None = None
    batch_cache: str | None = None
    cache_size: Callable[[ModelConfig], CacheSize] = lambda model: CacheSize()

    def memory_on(self, config: ModelConfig, tp: int, head_groups: int = 1) -> MixerMemory:
        """Return what a layer holds on each of `tp` ranks, where it can work on groups of heads: on so many."""
        if head_groups > 1 and self.grouped_memory is not None:
            return self.grouped_memory(config, tp, head_groups)
        if self.memory is not None:
            return self.memory(config, tp)
        widths = -(-self.matrix_weights(config) // (config.hidden_size * tp))  # of all that its matrices take and give
        return MixerMemory(kept=2 * widths, backward=2 * widths)

    def build(self, config: ModelConfig, layer: int) -> Mixer:
        """Make the mixer of a layer, counted from 0 over layers of all kinds."""
        return pkgutil.resolve_name(self.module)(config, layer)

    def batch_cache_class(self) -> type[BatchCache]:
        """Return the class of what serving remembers in a layer of it.

        Raises:
            ConfigError: it has none.
        """
        if self.batch_cache is None:
            raise ConfigError("model.layer_pattern", self.letter, f"{self.name} layers cannot be served",
                              "give their MixerSpec a batch_cache (docs/mixers.md)")  # fmt: skip
        return pkgutil.resolve_name(self.batch_cache)


def mixer_spec(letter: str) -> MixerSpec:
    """Return the mixer that a letter of `model.layer_pattern` stands for.

    Raises:
        ConfigError: there is none.
    """
    if letter not in MIXERS:
        raise ConfigError("model.layer_pattern", letter, f"may hold only {_known()}", "for example LLLLLLLS")
    return MIXERS[letter]


def check_layer_pattern(config: ModelConfig) -> None:
    """Refuse a model with a layer of an unknown kind, before anything starts.

    Raises:
        ConfigError: a letter of `model.layer_pattern` stands for no mixer.
    """
    require(set(config.layer_pattern) <= MIXERS.keys(), "model.layer_pattern", config.layer_pattern,
            f"may hold only {_known()}", "for example LLLLLLLS")  # fmt: skip


def _known() -> str:
    return " and ".join(f"{letter} ({spec.name})" for letter, spec in MIXERS.items())


def heads_problem(model: ModelConfig, tp: int) -> str:
    """Say why tp cannot share out the heads of a model (`num_heads`), empty if it can."""
    return f"model.num_heads {model.num_heads} / tp {tp} is not whole" if model.num_heads % tp else ""


def _lightning_matrices(model: ModelConfig) -> int:
    """Elements of qkv, output gate and output projection."""
    return 5 * model.inner_size * model.hidden_size


def _lightning_flops(model: ModelConfig, doc_lengths: Sequence[int]) -> int:
    """Linear algorithmic cost: one state update and one readout a token and head, 2 * 2 * d * d.

    Chunked implementations do more (the products inside a chunk), and MFU measures them against this useful minimum.
    """
    return 2 * 2 * sum(doc_lengths) * model.inner_size * model.head_dim


def _lightning_placements(model: ModelConfig, tp: int) -> Mapping[str, Placement]:
    return {
        "qkv_proj.weight": Placement.ROWS,
        "output_gate.weight": Placement.ROWS,
        "norm.weight": Placement.ROWS,
        "out_proj.weight": Placement.COLUMNS,
    }


def _lightning_memory(model: ModelConfig, tp: int) -> MixerMemory:
    """Kept: the projection of q, k and v (3 widths) and its SiLU (3), output, gate, and their product.

    Backward: when the gradient of the projection comes (3) and those of output and gate are there (2), output, gate and
    their product are gone (3), so that no more than one of the first gradients comes on top. In a graph, gradients of
    output and gate (2), of the projection (3), and of the product (1).
    """
    width = model.inner_size // tp
    return MixerMemory(
        kept=9 * width,
        kept_fp32=1,
        backward=width,
        recorded_backward=6 * width,
        state=model.num_heads // tp * model.head_dim * model.head_dim,
    )


def _grouped_lightning_memory(model: ModelConfig, tp: int, groups: int) -> MixerMemory:
    """Kept: the attention's output.

    Backward: of one group of heads the projection (3 widths), its SiLU (3), and the gradient of the projection (3); or
    of one chunk of tokens the gate, the product, their gradients and those of what came in (8).
    """
    whole, width = _lightning_memory(model, tp), model.inner_size // tp
    return MixerMemory(kept=width, backward=9 * width // groups, state=whole.state // groups)


def _softmax_memory(model: ModelConfig, tp: int) -> MixerMemory:
    """Kept: q and output (2 widths), k and v, a float32 log-sum-exp a head.

    Backward: gradients of q (1), and of k and v before and after the rotation (4 narrower widths). In a graph, those
    of output and q, and of q before it was rotated (3), of k and v likewise, and the kernel's float32 sum of q's
    gradient (2).
    """
    width, kv_width = model.inner_size // tp, max(1, model.num_kv_heads // tp) * model.head_dim
    heads = model.num_heads // tp
    return MixerMemory(
        kept=2 * width + 2 * kv_width,
        kept_fp32=heads,
        backward=width + 4 * kv_width,
        recorded_backward=5 * width + 4 * kv_width,
        attention_output=width,
        attention_fp32=heads,
    )


def _softmax_matrices(model: ModelConfig) -> int:
    """Elements of q and o over all heads, k and v over the grouped ones."""
    return 2 * (model.inner_size + model.num_kv_heads * model.head_dim) * model.hidden_size


def _softmax_flops(model: ModelConfig, doc_lengths: Sequence[int]) -> int:
    """Scores and weighted sums of the causal pairs inside each document, n(n+1)/2."""
    pairs = sum(length * (length + 1) // 2 for length in doc_lengths)
    return 2 * 2 * pairs * model.inner_size


def _softmax_placements(model: ModelConfig, tp: int) -> Mapping[str, Placement]:
    """Key/value heads that are fewer than ranks lie on every rank, which uses the one that its query heads share."""
    key_value = Placement.ROWS if model.num_kv_heads % tp == 0 else Placement.REPLICATED
    return {
        "q_proj.weight": Placement.ROWS,
        "k_proj.weight": key_value,
        "v_proj.weight": key_value,
        "o_proj.weight": Placement.COLUMNS,
    }


def _softmax_problem(model: ModelConfig, tp: int) -> str:
    if problem := heads_problem(model, tp):
        return problem
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        return f"model.num_kv_heads {model.num_kv_heads} and tp {tp}: neither divides the other"
    return ""


LIGHTNING = MixerSpec(
    letter="L",
    name="lightning",
    module="mmtrain.model.mixers.lightning:LightningAttention",
    matrix_weights=_lightning_matrices,
    vector_weights=lambda model: model.inner_size,  # of the norm
    attention_flops=_lightning_flops,
    placements=_lightning_placements,
    tp_problem=heads_problem,
    context_parallel=True,
    memory=_lightning_memory,
    grouped_memory=_grouped_lightning_memory,
    batch_cache="mmtrain.model.mixers.lightning_slots:LightningSlots",
    cache_size=lambda model: CacheSize(document=model.inner_size * model.head_dim),
)

SOFTMAX = MixerSpec(
    letter="S",
    name="softmax",
    module="mmtrain.model.mixers.softmax:SoftmaxAttention",
    matrix_weights=_softmax_matrices,
    vector_weights=lambda model: 0,
    attention_flops=_softmax_flops,
    placements=_softmax_placements,
    tp_problem=_softmax_problem,
    context_parallel=True,
    memory=_softmax_memory,
    batch_cache="mmtrain.model.mixers.softmax_pages:SoftmaxPages",
    cache_size=lambda model: CacheSize(token=2 * model.num_kv_heads * model.head_dim),
)

MIXERS: dict[str, MixerSpec] = {spec.letter: spec for spec in (LIGHTNING, SOFTMAX)}
"""Every mixer by its letter."""

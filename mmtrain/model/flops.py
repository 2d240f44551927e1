"""Exact parameter counts and floating-point operations of a configuration: arithmetic only, no torch.

A product of [m, k] by [k, n] counts 2mnk, and its backward pass twice that. Element-wise work is not counted, as is
usual for MFU. Recomputation (activation checkpointing) is not counted either: it is not useful work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtrain.config import ModelConfig
from mmtrain.model.mixers.registry import MIXERS, check_layer_pattern


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: parameters of all layers and both embedding matrices.
        activated: parameters that one token meets, with both embedding matrices.
        activated_without_embeddings: the figure that papers call activated (MiniMax-01: 45.9B).
        by_part: `total`, by part of the model.
    """

    total: int
    activated: int
    activated_without_embeddings: int
    by_part: Mapping[str, int]


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of one step.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        by_part: `forward`, by part of the model.
    """

    forward: float
    backward: float
    by_part: Mapping[str, float]

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model (shapes: those of the released weights).

    Raises:
        ConfigError: `layer_pattern` has a letter that stands for no mixer.
    """
    check_layer_pattern(model)
    hidden, layers = model.hidden_size, model.num_layers
    expert = 3 * hidden * model.ffn_hidden_size
    layers_of = Counter(model.layer_types)
    parts = {
        "embedding": model.vocab_size * hidden,
        **{
            mixer.name: layers_of[letter] * (mixer.matrix_weights(model) + mixer.vector_weights(model))
            for letter, mixer in MIXERS.items()
        },
        "router": layers * model.num_experts * hidden,
        "experts": layers * model.num_experts * expert,
        "dense_ffn": 0 if model.num_experts else layers * expert,
        "shared_expert": layers * _shared_weights(model),
        "norms": (2 * layers + 1) * hidden,
        "head": model.vocab_size * hidden,
    }
    total = sum(parts.values())
    idle = layers * max(0, model.num_experts - model.top_k) * expert
    embeddings = parts["embedding"] + parts["head"]
    return ParameterCount(total, total - idle, total - idle - embeddings, parts)


def step_flops(model: ModelConfig, doc_lengths: Sequence[int], kept_assignments: float | None = None) -> FlopCount:
    """Count the useful operations of one forward and backward pass over packed documents.

    A mixer's projections are counted by its matrices, 2 operations an element and token; its attention as its entry in
    `mmtrain.model.mixers.registry` says, over the documents as they are.

    Args:
        model: the architecture.
        doc_lengths: tokens of every document in the step.
        kept_assignments: token-to-expert assignments that were not dropped, summed over the layers; None: all of them.

    Raises:
        ConfigError: `layer_pattern` has a letter that stands for no mixer.
    """
    check_layer_pattern(model)
    tokens, hidden = sum(doc_lengths), model.hidden_size
    expert = 3 * hidden * model.ffn_hidden_size
    if kept_assignments is None:
        kept_assignments = tokens * model.top_k * model.num_layers
    layers_of = Counter(model.layer_types)
    parts: dict[str, float] = {}
    for letter, mixer in MIXERS.items():
        parts[f"{mixer.name}_projections"] = 2 * tokens * layers_of[letter] * mixer.matrix_weights(model)
        parts[f"{mixer.name}_attention"] = layers_of[letter] * mixer.attention_flops(model, doc_lengths)
    parts |= {
        "router": 2 * tokens * model.num_layers * model.num_experts * hidden,
        "experts": 2 * kept_assignments * expert if model.num_experts else 0,
        "dense_ffn": 0 if model.num_experts else 2 * tokens * model.num_layers * expert,
        "shared_expert": 2 * tokens * model.num_layers * _shared_weights(model),
        "head": 2 * tokens * hidden * model.vocab_size,
    }
    forward = sum(parts.values())
    return FlopCount(forward, 2 * forward, parts)


def paper_table1(arch: str, layers: int, hidden: int, heads: int, batch: int, seq: int) -> tuple[float, float]:
    """Return parameters and training FLOPs by MiniMax-01 Table 1, which leaves the embeddings out.

    The paper counts every pair of softmax attention, masked ones too (twice :func:`step_flops`), and for lightning
    attention 36 d^2/h operations a token and layer (three times the minimum of :func:`step_flops`, as blocks do more).

    Args:
        arch: ``softmax``, ``lightning`` or ``hybrid`` (7:1).
        layers: depth l.
        hidden: width d.
        heads: attention heads h.
        batch: sequences b.
        seq: tokens n of a sequence.

    Raises:
        ValueError: unknown `arch`.
    """
    square = layers * hidden**2
    terms = {
        "softmax": (0.0, seq / (6 * hidden)),
        "lightning": (2 / heads, 1 / (2 * heads)),
        "hybrid": (7 / (4 * heads), seq / (48 * hidden) + 7 / (16 * heads)),
    }
    if arch not in terms:
        raise ValueError(f"arch={arch}: Table 1 has {', '.join(terms)}")
    extra_parameters, attention = terms[arch]
    return square * (12 + extra_parameters), 72 * batch * seq * square * (1 + attention + 5 / (18 * hidden))


# Dense peaks in FLOP/s from NVIDIA's data sheets: (part of the device's name, bf16 and fp16, fp32 without tensor
# cores). The first match counts, so that variants come before the name they extend.
_PEAKS = (
    ("H100 PCIe", 756e12, 51e12),
    ("H800 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak of one device in FLOP/s, dense, or None for a device or type that is not in the table.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: ``bf16``, ``fp16`` or ``fp32``, or torch's name of it.
    """
    column = {"bf16": 1, "bfloat16": 1, "fp16": 1, "float16": 1, "fp32": 2, "float32": 2}.get(
        str(dtype).removeprefix("torch.")
    )
    if column is None:
        return None
    return next((peaks[column] for peaks in _PEAKS if peaks[0] in device_name), None)


def _shared_weights(model: ModelConfig) -> int:
    """One shared expert and its gate per token, when it is on (beside routed experts only)."""
    shared = model.shared_ffn_hidden_size if model.num_experts else 0
    return 3 * model.hidden_size * shared + model.hidden_size if shared else 0

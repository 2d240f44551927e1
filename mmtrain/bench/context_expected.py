"""Seconds that a training step should take by its operations and by the rates that kernels reach on one GPU.

Matrix products, attention of both kinds, the bytes of what lies between them (:mod:`mmtrain.bench.context_streams`)
and the optimizer's update: copies, communication and waiting are not in it, so that what a step takes beyond it is
theirs. Work is shared out evenly.

How often a step computes a product, where a backward pass counts as two (`chunks`: parallel.ffn_chunk_tokens; `groups`:
parallel.lightning_head_groups; recomputed: parallel.activation_checkpoint):

| products | plain | recomputed | more |
|---|---|---|---|
| mixers' projections, router, experts, shared expert | 3 | 4 | |
| qkv and output gate of lightning | 3 | 4 | 1 with groups |
| output projection of lightning | 3 | 4 | 1 with groups, where its gradient is added to a sum |
| first of experts and shared expert | 3 | 4 | 1 with chunks |
| first of a dense feed-forward | 3 | 4 | with chunks 4 always |
| last of a dense feed-forward | 3 | 3 | 1 recomputed, without chunks, where its gradient is added to a sum |
| head | 3 | 3 | its gradients are made in forward |

A block that is computed again stops when all is there that backward reads: before the last product of a dense
feed-forward, which torch's own product and chunks save the input of before they compute. The product that adds its
weight's gradient to a sum (`mmtrain.model.gradient_sum`) saves it after. tests/bench counts them all in real steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtrain.bench.context_streams import streamed_elements
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.flops import count_parameters, step_flops
from mmtrain.model.mixers.registry import LIGHTNING, SOFTMAX

SOFTMAX_BACKWARD = 2.5
"""Operations of softmax attention's backward over those of its forward: its scores are computed again."""
UPDATE_BYTES = 4 * 7
"""Bytes a parameter of AdamW's update in fp32: weight and both moments read and written, gradient read."""
PARTS = ("products", "experts", "softmax", "lightning", "streams", "optimizer")
"""Parts of a step's time, in the order of the table."""


@dataclass(frozen=True)
class Rates:
    """What one GPU reaches that has nobody to talk to.

    Attributes:
        products: operations a second of products with dense matrices.
        experts: likewise of experts' grouped products; 0 of a model without.
        softmax: operations a second of softmax attention, forward and backward (`SOFTMAX_BACKWARD`); zeros without.
        lightning: seconds a token and layer of lightning attention's kernels, forward and backward; zeros without.
        copy: bytes a second, those read and those written.
    """

    products: float
    experts: float
    softmax: tuple[float, float]
    lightning: tuple[float, float]
    copy: float

    def figures(self) -> dict[str, float]:
        """Them as a row tells them: in 10^12 a second, and in nanoseconds a token; those that are there."""
        tera = {"products": self.products, "experts": self.experts, "softmax_forward": self.softmax[0],
                "softmax_backward": self.softmax[1]}  # fmt: skip
        found = {f"{name}_tflops": value / 1e12 for name, value in tera.items()}
        forward, backward = self.lightning
        found |= {"lightning_forward_ns": forward * 1e9, "lightning_backward_ns": backward * 1e9}
        return {
            name: float(f"{value:.4g}") for name, value in (found | {"copy_tbs": self.copy / 1e12}).items() if value
        }


def product_operations(
    model: ModelConfig,
    parallel: ParallelConfig,
    doc_lengths: Sequence[int],
    sums: bool = False,
    kept_assignments: float | None = None,
) -> Mapping[str, float]:
    """Count operations of all products with matrices in a step, computed again or not, by part of the model.

    Args:
        model: the architecture.
        parallel: says what is computed again.
        doc_lengths: tokens of every document in the step.
        sums: whether gradients of weights are added to sums where they are made, as ranks do that keep whole weights.
        kept_assignments: as of :func:`step_flops`.
    """
    once = step_flops(model, doc_lengths, kept_assignments).by_part
    again, chunks = int(parallel.recomputes), int(parallel.ffn_chunk_tokens is not None)
    groups = int(parallel.lightning_head_groups > 1)
    times = {part: 3.0 + again for part in once if not part.endswith("_attention")}
    times["lightning_projections"] += groups * (1.0 if sums else 4 / 5)
    times["experts"] += chunks * 2 / 3
    times["dense_ffn"] = (4 * 2 + 3) / 3 if chunks else 3 + again * (1.0 if sums else 2 / 3)
    times["head"] = 3.0
    found = {part: once[part] * count for part, count in times.items()}
    shared = model.shared_ffn_hidden_size if model.num_experts else 0
    found["shared_expert"] += chunks * 2 * sum(doc_lengths) * model.num_layers * 2 * model.hidden_size * shared
    return found


def expected_seconds(
    model: ModelConfig,
    parallel: ParallelConfig,
    doc_lengths: Sequence[int],
    rates: Rates,
    ranks: int,
    sums: bool = False,
    kept_assignments: float | None = None,
    element: int = 2,
) -> dict[str, float]:
    """Return seconds of a step of one row on each of the ranks that share it, by :data:`PARTS`.

    Args:
        rates: of one GPU.
        ranks: that share the row, and shards of parameters and moments.
        element: bytes of an element that products compute with.
        others: as of :func:`product_operations`.
    """
    tokens, assigned = sum(doc_lengths), sum(doc_lengths) * model.num_layers * model.top_k
    kept = 1.0 if kept_assignments is None or not model.num_experts else kept_assignments / assigned
    products = product_operations(model, parallel, doc_lengths, sums, kept_assignments)
    forwards = 1 + (parallel.activation_checkpoint == "block")
    groups = int(parallel.lightning_head_groups > 1)
    layers = Counter(model.layer_types)
    softmax = layers[SOFTMAX.letter] * SOFTMAX.attention_flops(model, doc_lengths)
    lightning = layers[LIGHTNING.letter] * tokens
    seconds = {
        "products": (sum(products.values()) - products["experts"]) / rates.products,
        "experts": products["experts"] / rates.experts if model.num_experts else 0.0,
        "softmax": softmax * (forwards / rates.softmax[0] + SOFTMAX_BACKWARD / rates.softmax[1]) if softmax else 0.0,
        "lightning": lightning * ((1 + parallel.recomputes + groups) * rates.lightning[0] + rates.lightning[1]),
        "streams": element * tokens * streamed_elements(model, parallel, kept) / rates.copy,
        "optimizer": UPDATE_BYTES * count_parameters(model).total / rates.copy,
    }
    return {part: seconds[part] / ranks for part in PARTS}

"""The stages of a pipeline: which layers each has, and how a model is cut into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.model import HybridLM
from mmtrain.vision.flops import encoder_flops
from mmtrain.vision.model import VisionLanguageModel


def layer_costs(model: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Floating-point operations of the forward pass over one row: of each layer, and of the head.

    The first layer's are with those of the eyes, which lie with it, as if the row were of images alone.
    """
    counts = {
        kind: step_flops(replace(model, num_layers=1, layer_pattern=kind), [seq_len]) for kind in set(model.layer_types)
    }
    costs = {kind: count.forward - count.by_part["head"] for kind, count in counts.items()}
    layers = [costs[kind] for kind in model.layer_types]
    if model.vision is not None:
        layers[0] += encoder_flops(model, seq_len / model.vision.patches, seq_len)
    return layers, next(iter(counts.values())).by_part["head"]


Fits = Callable[[int, int, int], bool]
"""Whether a stage may hold the layers from one on to before another: (stage, start, end) -> bool."""


def split_layers(model: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """Consecutive layers for each stage, at least one, so that the costliest stage costs as little as possible.

    The last stage has the head as well; looking up embeddings costs nothing.
    """
    found = partition(*layer_costs(model, seq_len), stages)
    assert found is not None
    return found


def partition(layers: Sequence[float], head: float, stages: int, fits: Fits | None = None) -> list[range] | None:
    """Cut a row of layers into stages that may hold theirs, so that the costliest one costs as little as possible.

    Exact, by dynamic programming. Of the cuts whose costliest stage costs that, the one with the fewest layers in its
    largest stage, then with the most even numbers of layers: at a million tokens, where softmax layers cost several
    others, an 80-layer model on 16 stages has 5 or 6 layers in most of them, in place of 1 to 7 at the same cost.

    Args:
        layers: cost of each layer.
        head: cost that the last stage has besides.
        stages: at most as many as layers.
        fits: None lets every stage hold anything.

    Returns None where no cut fits.
    """
    before, count = [0.0, *accumulate(layers)], len(layers)

    def cost(start: int, end: int) -> float:
        return before[end] - before[start] + (head if end == count else 0.0)

    def may_hold(stage: int, start: int, end: int) -> bool:
        return fits is None or fits(stage, start, end)

    cheapest = _most_even(count, stages, cost, may_hold)
    if cheapest is None:
        return None
    most = max(cost(part.start, part.stop) for part in cheapest) * (1 + 1e-9)  # sums in another order are a little off
    return _most_even(
        count,
        stages,
        lambda start, end: end - start,
        lambda stage, start, end: cost(start, end) <= most and may_hold(stage, start, end),
    )


def _most_even(count: int, stages: int, weight: Callable[[int, int], float], fits: Fits) -> list[range] | None:
    """The cut of `count` layers whose largest stage weighs least; equals are told apart by the sum of squares.

    Then by their bounds, so that all ranks find the same. A stage's weight is that of the layers from one to before
    another.
    """
    # best[i], for the first i layers: heaviest stage; sum of squares; stages' bounds
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(1, stages + 1):
        extended = {}
        for end in [count] if stage == stages else range(stage, count - (stages - stage) + 1):
            choices = []
            for start in (start for start in best if start < end and fits(stage - 1, start, end)):
                largest, squares, bounds = best[start]
                own = weight(start, end)
                choices.append((max(largest, own), squares + own * own, (*bounds, end)))
            if choices:
                extended[end] = min(choices)
        best = extended
    return [range(start, end) for start, end in pairwise(best[count][2])] if count in best else None


def split_stages(
    model: HybridLM, rank: int, ranks: int, chunks: int, layers: Sequence[Sequence[int]]
) -> dict[int, HybridLM]:
    """Prune a (meta) model to the layers that one rank of a pipeline holds, and return its stages by their number.

    Rank r holds stages r, r + ranks, r + 2 ranks, ... The stages share the modules of `model`, in which parameters
    keep the names that they have in the whole model; a single stage is `model` itself.

    Args:
        chunks: stages of each rank.
        layers: numbers of the layers of every stage of the pipeline.
    """
    count = ranks * chunks
    mine = range(rank, count, ranks)
    stages = {stage: model if chunks == 1 else _clone(model) for stage in mine}
    for stage, part in stages.items():
        part.prune(set(layers[stage]), embedding=stage == 0, head=stage == count - 1)
    here = {layer for stage in mine for layer in layers[stage]}
    model.prune(here, embedding=0 in mine, head=count - 1 in mine)
    return stages


def _clone(model: HybridLM) -> HybridLM:
    """Another model of the same modules, which can be pruned on its own."""
    clone = meta_model(model.config)
    clone.token_loss, clone.label_score = model.token_loss, model.label_score
    clone.document_score = model.document_score
    if isinstance(model, VisionLanguageModel) and isinstance(clone, VisionLanguageModel):
        clone.image_work = model.image_work
    for name, module in model.named_children():
        if name != "layers":
            setattr(clone, name, module)
    for name, block in model.layers.named_children():
        setattr(clone.layers, name, block)
    return clone

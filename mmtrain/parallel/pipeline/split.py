"""The stages of a pipeline: which layers each has, and how a model is cut into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.init import meta_model
from mmtrain.model.model import HybridLM


def layer_costs(model: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Floating-point operations of the forward pass over one row: of each layer, and of the head."""
    counts = {
        kind: step_flops(replace(model, num_layers=1, layer_pattern=kind), [seq_len]) for kind in set(model.layer_types)
    }
    costs = {kind: count.forward - count.by_part["head"] for kind, count in counts.items()}
    return [costs[kind] for kind in model.layer_types], next(iter(counts.values())).by_part["head"]


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

    Exact, by dynamic programming over the first layers and stages. Equals are told apart by the sum of squares, then by
    their bounds, so that all ranks find the same.

    Args:
        layers: cost of each layer.
        head: cost that the last stage has besides.
        stages: at most as many as layers.
        fits: None lets every stage hold anything.

    Returns None where no cut fits.
    """
    before = [0.0, *accumulate(layers)]
    count = len(layers)
    # best[i], for the first i layers: costliest stage; sum of squares, for the more even of equals; stages' bounds
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(1, stages + 1):
        extended = {}
        for end in [count] if stage == stages else range(stage, count - (stages - stage) + 1):
            choices = []
            for start in (start for start in best if start < end and (fits is None or fits(stage - 1, start, end))):
                largest, squares, bounds = best[start]
                cost = before[end] - before[start] + (head if stage == stages else 0.0)
                choices.append((max(largest, cost), squares + cost * cost, (*bounds, end)))
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
    for name, module in model.named_children():
        if name != "layers":
            setattr(clone, name, module)
    for name, block in model.layers.named_children():
        setattr(clone.layers, name, block)
    return clone

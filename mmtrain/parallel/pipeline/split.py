"""The stages of a pipeline: which layers each has, and how a model is cut into them."""

from __future__ import annotations

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


def split_layers(model: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """Consecutive layers for each stage, at least one, so that the costliest stage costs as little as possible.

    The last stage has the head as well; looking up embeddings costs nothing.
    """
    layers, head = layer_costs(model, seq_len)
    before = [0.0, *accumulate(layers)]
    count = len(layers)
    # best[i], for the first i layers: costliest stage; sum of squares, for the more even of equals; stages' bounds
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(1, stages + 1):
        extended = {}
        for end in [count] if stage == stages else range(stage, count - (stages - stage) + 1):
            choices = []
            for start in (start for start in best if start < end):
                largest, squares, bounds = best[start]
                cost = before[end] - before[start] + (head if stage == stages else 0.0)
                choices.append((max(largest, cost), squares + cost * cost, (*bounds, end)))
            extended[end] = min(choices)
        best = extended
    bounds = best[count][2]
    return [range(start, end) for start, end in pairwise(bounds)]


def split_stages(model: HybridLM, rank: int, ranks: int, chunks: int, seq_len: int) -> dict[int, HybridLM]:
    """Prune a (meta) model to the layers that one rank of a pipeline holds, and return its stages by their number.

    Rank r holds stages r, r + ranks, r + 2 ranks, ... The stages share the modules of `model`, in which parameters
    keep the names that they have in the whole model; a single stage is `model` itself.

    Args:
        chunks: stages of each rank.
        seq_len: length of sequence at which the stages cost about the same.
    """
    count = ranks * chunks
    layers = split_layers(model.config, count, seq_len)
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

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


def take_stages(model: HybridLM, rank: int, ranks: int, chunks: int, seq_len: int) -> dict[int, HybridLM]:
    """Leave of a (meta) model what one rank of a pipeline holds, and return its stages by their number.

    Rank r holds stages r, r + ranks, r + 2 ranks, ... The stages share the modules of `model`, in which parameters
    keep the names that they have in the whole model; a single stage is `model` itself.
    """
    count = ranks * chunks
    layers = split_layers(model.config, count, seq_len)
    mine = range(rank, count, ranks)
    stages = {stage: model if chunks == 1 else _twin(model) for stage in mine}
    for stage, part in stages.items():
        keep(part, set(layers[stage]), first=stage == 0, last=stage == count - 1)
    keep(model, {layer for stage in mine for layer in layers[stage]}, first=0 in mine, last=count - 1 in mine)
    return stages


def keep(model: HybridLM, layers: set[int], *, first: bool, last: bool) -> None:
    """Take away all layers but these, the embedding but from the `first` stage, norm and head but from the `last`."""
    for layer in layer_numbers(model):
        if layer not in layers:
            delattr(model.layers, str(layer))  # unlike `del model.layers[i]`, others keep their names
    if not first:
        model.embed_tokens = None
    if not last:
        model.norm = model.lm_head = None


def layer_numbers(model: HybridLM) -> list[int]:
    """Numbers of the layers that a model still has, in the whole one."""
    return [int(name) for name, _ in model.layers.named_children()]


def _twin(model: HybridLM) -> HybridLM:
    """Another model of the same modules, from which some can be taken away."""
    twin = meta_model(model.config)
    twin.token_loss = model.token_loss
    for name, module in model.named_children():
        if name != "layers":
            setattr(twin, name, module)
    for name, block in model.layers.named_children():
        setattr(twin.layers, name, block)
    return twin

"""Models that the inference bench measures, of random weights, and the bytes that they take."""

from __future__ import annotations

import gc
import time
from typing import NamedTuple

import torch

from mmtrain.bench.step_cases import CONFIGS
from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.config.cli import compose
from mmtrain.infer.compute_dtype import INT8, cast_for_compute, compute_dtype
from mmtrain.infer.joined_projections import join_projections
from mmtrain.infer.planning.weights import ServingLayout, weight_bytes_on
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.model.model import HybridLM


class ServedModel(NamedTuple):
    """A model on a device.

    Attributes:
        model: in evaluation mode.
        weights: bytes that it takes of the device, as the allocator counts them (on a CPU: of its tensors).
        planned: bytes that `mmtrain.infer.planning` reckons.
    """

    model: HybridLM
    weights: int
    planned: int


def model_config(name: str) -> ModelConfig:
    """A preset's architecture."""
    return compose(["stage=quickstart", f"model={name}", "data.path=none", "run.name=bench"], CONFIGS).model


def served(config: ModelConfig, precision: str, device: torch.device) -> ServedModel:
    """A model of random weights at a precision, made on the device; nothing else may be made there meanwhile."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = meta_model(config)
    cast_for_compute(model, compute_dtype(precision, device))
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else parameter.fill_(1.0)
    if precision in INT8:
        quantise_model(model, INT8[precision])
    join_projections(model)
    planned = sum(weight_bytes_on(config, ServingLayout(), precision, device).values())
    gc.collect()
    taken = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else tensor_bytes(model)
    return ServedModel(model.eval(), taken, planned)


def tensor_bytes(model: HybridLM) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def read_bytes(model: HybridLM) -> int:
    """Bytes that a step reads of weights: all but the embedding, of which it reads a row a document."""
    return tensor_bytes(model) - model.embed_tokens.weight.nbytes


def copy_rate(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes/s that a copy reads and writes on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best

"""The plan of serving a model on some GPUs: what each holds at a context, and the longest context that fits.

Weights come from the shapes of the parameters, keys and states from the engine's own plan of its memory, so that the
engine on such a device comes to the same. What a step takes beside them is reckoned from above; an engine on a GPU
tries it out instead.

Legend: P prompt tokens of a step, R rows of experts, D model width, F inner width, I width of all heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mmkernels.int8_weights.eager import ELEMENTS
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.compute_dtype import INT8, compute_dtype
from mmtrain.infer.planning.weights import ServingLayout, weight_bytes_on
from mmtrain.infer.serving.document_images import TILES_AT_ONCE
from mmtrain.infer.serving.memory_plan import copies_bytes, document_bytes, plan_memory, token_bytes, without_copies
from mmtrain.infer.serving.options import EngineOptions

GPU = torch.device("cuda")


@dataclass(frozen=True)
class ServingPlan:
    """What each device of a layout takes, in bytes.

    Attributes:
        model: name of the architecture.
        precision: of the weights.
        tp: devices.
        ep: groups of them with experts of their own.
        tokens: of the context of each request.
        requests: at once.
        weights: by part of the model.
        weights_bytes: their sum.
        keys_bytes: keys and values of all requests.
        states_bytes: fp32 states of all requests.
        copies_bytes: keys of a layer as one tensor, which prefill makes.
        step_bytes: the most that a step's own tensors take.
        device_bytes: what there is.
        longest: tokens of the longest context of each request that an engine would take; None: any; 0: weights alone do
            not fit.
    """

    model: str
    precision: str
    tp: int
    ep: int
    tokens: int
    requests: int
    weights: dict[str, int]
    weights_bytes: int
    keys_bytes: int
    states_bytes: int
    copies_bytes: int
    step_bytes: int
    device_bytes: int
    longest: int | None

    @property
    def used_bytes(self) -> int:
        """What is taken of a device in all."""
        return self.weights_bytes + self.keys_bytes + self.states_bytes + self.copies_bytes + self.step_bytes

    @property
    def fits(self) -> bool:
        """Whether an engine would take the requests."""
        return self.longest is None or self.longest >= self.tokens

    def as_dict(self) -> dict[str, Any]:
        """Return all figures under their names, for JSON."""
        return asdict(self) | {"used_bytes": self.used_bytes, "fits": self.fits}


def plan_serving(
    config: ModelConfig, layout: ServingLayout, precision: str, tokens: int, device_bytes: int,
    options: EngineOptions | None = None,
) -> ServingPlan:  # fmt: skip
    """Reckon what serving a model takes of each device.

    Args:
        config: the architecture.
        layout: of the devices.
        precision: "fp32", "bf16", "int8" or "int8-g128".
        tokens: of each request, prompt and answer.
        device_bytes: memory of a device.
        options: of the engine; its `max_running` requests are served at once. None: one, without a prefix cache.

    Raises:
        ConfigError: the layout cannot cut the model, or a number makes no sense.
    """
    layout.check(config)
    for name, value in (("--tokens", tokens), ("--memory-gb", device_bytes)):
        if value < 1:
            raise ConfigError(name, value, "must be above 0", "give another number")
    options = EngineOptions(max_running=1, prefix_slots=0) if options is None else options
    options.validate()
    own, element = _on_one(config, layout.tp), compute_dtype(precision, GPU).itemsize
    parts = weight_bytes_on(config, layout, precision, GPU)
    weights, step = sum(parts.values()), step_bytes(config, layout, precision, options)
    pages = -(-tokens // options.page_tokens) * options.max_running
    keys = pages * options.page_tokens * token_bytes(own, element)
    slots = options.max_running + options.prefix_slots
    left = without_copies(own, int(options.memory_share * (device_bytes - weights - step)))
    return ServingPlan(
        config.name, precision, layout.tp, layout.ep, tokens, options.max_running, parts, weights, keys,
        slots * document_bytes(own, element), copies_bytes(own, keys), step, device_bytes,
        _longest(own, options, element, left),
    )  # fmt: skip


def step_bytes(config: ModelConfig, layout: ServingLayout, precision: str, options: EngineOptions) -> int:
    """Return the most that a step's own tensors take on a device: reckoned, not measured.

    The hidden states, their norm and the residual (4 P D); the larger of a mixer's (q, k, v before and after SiLU,
    gate, output and their product: 9 P I) and a feed-forward's (rows and results 2 R D, both products 3 R F, where all
    rows may come to one device's experts); an int8 weight's rows in bf16; the logits of all requests. Of a model with
    eyes, what a look at tiles takes where that is more: the two do not run at once.
    """
    element, width = compute_dtype(precision, GPU).itemsize, config.hidden_size
    tokens = options.prefill_tokens + options.max_running
    mixer = 9 * tokens * config.inner_size // layout.tp
    rows, ways = (tokens * config.top_k, layout.etp) if config.num_experts else (tokens, layout.tp)
    ffn = rows * (2 * width + 3 * (config.ffn_hidden_size // ways))
    logits = options.max_running * config.vocab_size * (element + 4)
    step = (4 * tokens * width + max(mixer, ffn) + (ELEMENTS if precision in INT8 else 0)) * element + logits
    return max(step, _look_bytes(config, element))


def _look_bytes(config: ModelConfig, element: int) -> int:
    """The most that a look at tiles takes: pixels, and of each token the residual, the inner width and projections."""
    vision = config.vision
    if vision is None:
        return 0
    pixels = 3 * vision.tile_size**2 * (4 + 4 + element)
    widths = 5 * vision.hidden_size + 2 * vision.ffn_hidden_size + 3 * config.hidden_size
    return TILES_AT_ONCE * (pixels + (vision.patches + 1) * widths * element)


def _on_one(config: ModelConfig, tp: int) -> ModelConfig:
    """The model as a device's caches see it: its share of the heads, and at least one key/value head."""
    return replace(config, num_heads=config.num_heads // tp, num_kv_heads=max(1, config.num_kv_heads // tp))


def _longest(own: ModelConfig, options: EngineOptions, element: int, budget: int) -> int | None:
    try:
        plan = plan_memory(own, options, element, budget)
    except ConfigError:
        return 0
    if plan.running < options.max_running or plan.kept < options.prefix_slots:
        return 0
    return None if plan.longest is None else plan.pages // options.max_running * options.page_tokens
